"""Boxes in pixels that look like another format and are not: they are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from locus_fast.data import read_boxes
from tests.locus_fast.box_cases import (
    COCO,
    LARGE,
    SIZES,
    STANDARD,
    Boxes,
    anywhere,
    drops,
    named,
    refusal,
    write,
)


def spoilt(boxes: Boxes, every: int) -> Boxes:
    """Every so many boxes with its corners swapped."""
    return [
        (image, box[2:] + box[:2] if place % every == 0 else box) for place, (image, box) in enumerate(boxes)
    ]


def beyond(boxes: Boxes, sizes: list[tuple[int, int]], every: int) -> Boxes:
    """Every so many boxes drawn on past the image's corner by a fifth."""
    ends = [[1.2 * side for side in sizes[image]] for image, _ in boxes]
    return [
        (image, [*box[:2], *ends[place]] if place % every == 0 else box)
        for place, (image, box) in enumerate(boxes)
    ]


def pages(count: int) -> Boxes:
    """Boxes that begin near the corner and are wider and higher than they are far from it."""
    rng = np.random.default_rng(0)
    return [
        (0, [*rng.uniform(10, 60, 2), *rng.uniform(400, 600, 1), *rng.uniform(500, 780, 1)])
        for _ in range(count)
    ]


STEREO = [(1920, 1080)]
LEGITIMATE: dict[str, tuple[list[tuple[int, int]], Boxes]] = {
    **{
        f"{name} images, {n} boxes": (sizes, anywhere(sizes, n))
        for name, sizes in SIZES.items()
        for n in (1, 3, 60, 2000)
    },
    **{
        f"in the first corner of large images, {n}": (LARGE, anywhere(LARGE, n, part=0.25))
        for n in (1, 3, 20, 300)
    },
    **{f"in the first corner, {n}": (COCO, anywhere(COCO, n, part=0.2)) for n in (1, 3, 20, 300)},
    "in the first corner, a twentieth swapped": (COCO, spoilt(anywhere(COCO, 300, part=0.2), 20)),
    "a twentieth swapped": (COCO, spoilt(anywhere(COCO, 300), 20)),
    "one of four swapped": (COCO, spoilt(anywhere(COCO, 4, part=0.2), 4)),
    "a twentieth sticking out": (COCO, beyond(anywhere(COCO, 300), COCO, 20)),
    "one of four sticking out": (COCO, beyond(anywhere(COCO, 4), COCO, 4)),
    "the left half of stereo pictures": (
        STEREO,
        [(0, [box[0] / 2, box[1], box[2] / 2, box[3]]) for _, box in anywhere(STEREO, 300)],
    ),
    "whole pages": ([(600, 800)], pages(60)),
    "one sign, always there": (LARGE, [(place % 2, [40.0, 50.0, 90.0, 110.0]) for place in range(60)]),
    "stars": (
        COCO,
        [(image, [box[0], box[1], box[0] + 1.5, box[1] + 2]) for image, box in anywhere(COCO, 60)],
    ),
    "some in the first pixel": (COCO, [*anywhere(COCO, 60), *[(0, [0.0, 0.0, 1.0, 1.0])] * 20]),
}


@pytest.mark.parametrize("kind", STANDARD)
@pytest.mark.parametrize("name", LEGITIMATE)
def test_pixels_are_read_as_pixels(tmp_path: Path, kind: str, name: str) -> None:
    sizes, boxes = LEGITIMATE[name]
    table = read_boxes(write(tmp_path, kind, sizes, boxes, STANDARD[kind]), None)
    good = [box for _, box in boxes if box[0] < box[2]]
    assert drops(table) == ({"reversed": len(boxes) - len(good)} if len(good) < len(boxes) else {})
    inside = np.clip(good, 0, np.tile([sizes[image] for image, box in boxes if box[0] < box[2]], 2))
    np.testing.assert_allclose(table.boxes, inside, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", STANDARD)
def test_the_standard_by_name_is_read_whatever_it_looks_like(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, LARGE, anywhere(LARGE, 60), "thousand")
    assert named(refusal(path)) == {"thousand"}
    assert len(read_boxes(path, None, STANDARD[kind]).boxes) == 60


def test_boxes_on_images_of_unknown_size_prove_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", COCO, anywhere(COCO, 20), "xyxy")
    lines = [json.dumps({"image": "nowhere.png", "bbox": [90, 90, 5, 5]})] * 100
    path.write_text("\n".join([path.read_text(), *lines]))
    assert drops(read_boxes(path, None)) == {"reversed": 100}
