"""Small data sets of noise images with boxes, for the tests of cues."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from locus_fast.data import read_boxes
from locus_fast.data.cues import CueRecipe, FileCues
from locus_fast.data.example import Example

RECIPE = CueRecipe(mix=(0.7, 0.3, 0.0), min_side=16, padding=(0.0, 0.1), scale=(0.8, 2.0))
WIDTH, HEIGHT = 100, 80
TINY, SMALL, LARGE = [40, 30, 8, 9], [10, 20, 16, 18], [5, 5, 50, 40]  # xywh: 0.9%, 3.6% and 25% of the image


def recipe(**changes: Any) -> CueRecipe:
    return CueRecipe(**{**vars(RECIPE), **changes})


def noise(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def dataset(folder: Path, bboxes_of: Iterable[list[Any]]) -> Path:
    """A COCO file and its noise images 0.png, 1.png, ..., each with the boxes (xywh) of one entry of
    `bboxes_of`."""
    images, annotations = [], []
    for place, bboxes in enumerate(bboxes_of):
        Image.fromarray(noise(seed=place)).save(folder / f"{place}.png")
        images.append({"id": place, "file_name": f"{place}.png", "width": WIDTH, "height": HEIGHT})
        annotations += [{"image_id": place, "bbox": bbox} for bbox in bboxes]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def cues(data: Path, held_out: int = 4, seed: int = 0, **changes: Any) -> FileCues:
    return FileCues(read_boxes(data, None), recipe(**changes), seed, held_out)


def same(first: Example, second: Example) -> bool:
    arrays = np.array_equal(first.image, second.image) and np.array_equal(first.cue, second.cue)
    return arrays and (first.box, first.size_class, first.source, first.skipped) == (
        second.box,
        second.size_class,
        second.source,
        second.skipped,
    )


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def all_held_out(source: FileCues) -> list[Example]:
    return [source.held_out(index) for index in range(source.held_out_count)]
