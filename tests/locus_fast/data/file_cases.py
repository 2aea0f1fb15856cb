"""Small files of boxes, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from locus_fast.data import BoxTable, read_boxes
from locus_fast.errors import UserError

GOOD = [10, 20, 30, 15]  # xywh


def draw(path: Path, width: int = 100, height: int = 80) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)
    return path


def coco(folder: Path, bboxes: list[Any], **changes: Any) -> Path:
    """A COCO file of one image, 100x80 a.png with id 1, with one annotation a bbox; `changes` replace
    top-level entries."""
    draw(folder / "a.png")
    annotations = [
        {"id": 100 + place, "image_id": 1, "bbox": bbox, "iscrowd": 0} for place, bbox in enumerate(bboxes)
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}],
        "annotations": annotations,
        **changes,
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def lines(folder: Path, records: list[Any]) -> Path:
    draw(folder / "a.png")
    path = folder / "boxes.jsonl"
    path.write_text(
        "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records)
    )
    return path


def box_line(bbox: Any, image: str = "a.png") -> dict[str, Any]:
    return {"image": image, "bbox": bbox}


def drops(table: BoxTable) -> dict[str, tuple[int, str]]:
    return {reason: (entry.count, entry.first) for reason, entry in table.dropped.items()}


def refusal(data: Path, images: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_boxes(data, images)
    assert "\n" not in str(caught.value)
    return str(caught.value)
