"""Small data files of boxes in every format, for the tests of `--box-format`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from locus_fast.data import BoxTable, read_boxes
from locus_fast.errors import UserError

STANDARD = {"coco": "xywh", "jsonl": "xyxy"}
COCO = [(640, 480), (480, 640), (500, 375)]
LARGE = [(4000, 3000), (3000, 2000)]
THOUSAND_WIDE = [(1000, 667), (667, 1000)]
NEARLY_THOUSAND = [(900, 900), (960, 920)]
MIXED = [(640, 480), (4000, 3000), (2000, 3000), (3000, 3000)]
SIZES = {
    "COCO's": COCO,
    "large": LARGE,
    "1000 wide": THOUSAND_WIDE,
    "nearly 1000": NEARLY_THOUSAND,
    "mixed": MIXED,
}

MEANING = {
    "xyxy": "x1, y1, x2, y2 in pixels",
    "xywh": "x, y, width, height in pixels",
    "normalized": "x1, y1, x2, y2 from 0 to 1",
    "thousand": "x1, y1, x2, y2 from 0 to 1000",
}

Boxes = list[tuple[int, list[float]]]  # image, xyxy in pixels


def anywhere(sizes: list[tuple[int, int]], count: int, seed: int = 0, part: float = 1.0) -> Boxes:
    """Small objects all over the images, or within the first `part` of their sides."""
    rng, boxes = np.random.default_rng(seed), []
    for _ in range(count):
        image = int(rng.integers(len(sizes)))
        side = rng.uniform(0.01, 0.06, 2)
        corner = rng.uniform(0, 1, 2) * (part - side)
        boxes.append((image, (np.concatenate((corner, corner + side)) * np.tile(sizes[image], 2)).tolist()))
    return boxes


def written(box: list[float], size: tuple[int, int], form: str) -> list[float]:
    """xyxy in pixels as another format has it."""
    x1, y1, x2, y2 = box
    width, height = size
    return {
        "xyxy": [x1, y1, x2, y2],
        "xywh": [x1, y1, x2 - x1, y2 - y1],
        "normalized": [x1 / width, y1 / height, x2 / width, y2 / height],
        "thousand": [1000 * x1 / width, 1000 * y1 / height, 1000 * x2 / width, 1000 * y2 / height],
        "normalized widths": [x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height],
        "thousand widths": [
            1000 * x1 / width,
            1000 * y1 / height,
            1000 * (x2 - x1) / width,
            1000 * (y2 - y1) / height,
        ],
    }[form]


def write(folder: Path, kind: str, sizes: list[tuple[int, int]], boxes: Boxes, form: str) -> Path:
    """A data file of the boxes in this format, and its images."""
    for image, size in enumerate(sizes):
        Image.new("1", size).save(folder / f"{image}.png")
    values = [(image, written(box, sizes[image], form)) for image, box in boxes]
    if kind == "coco":
        images = [
            {"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(sizes)
        ]
        annotations = [{"image_id": image, "bbox": box} for image, box in values]
        (folder / "boxes.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        return folder / "boxes.json"
    lines = [json.dumps({"image": f"{image}.png", "bbox": box}) for image, box in values]
    (folder / "boxes.jsonl").write_text("\n".join(lines))
    return folder / "boxes.jsonl"


def refusal(path: Path, box_format: str = "auto") -> str:
    with pytest.raises(UserError) as caught:
        read_boxes(path, None, box_format)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def named(sentence: str) -> set[str]:
    """The formats that a sentence says to give where the boxes are so."""
    return set(re.findall(r"--box-format (\w+)(?= if they are|, which reads)", sentence))


def drops(table: BoxTable) -> dict[str, int]:
    return {reason: entry.count for reason, entry in table.dropped.items()}
