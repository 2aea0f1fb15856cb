"""COCO instances files: images with ids, annotations with an image's id and a bbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from locus_fast.data.rows import Rows, utf8
from locus_fast.errors import UserError


def read_coco(rows: Rows) -> None:
    """Take every image and annotation of `rows.source` into `rows`; raises UserError for what is no COCO
    file."""
    content = _parse(rows.source)
    slots: dict[str, int] = {}
    for position, image in enumerate(content["images"]):
        where = f"{rows.source} images[{position}]"
        if (
            not isinstance(image, dict)
            or "id" not in image
            or not isinstance(image.get("file_name"), str)
            or not image["file_name"]
        ):
            raise UserError(f"{where} lacks an id or a file_name: each image needs both")
        if _id(image["id"]) in slots:
            raise UserError(f"{where} repeats the id {image['id']!r}: each image needs an id of its own")
        slots[_id(image["id"])] = rows.image(image["file_name"], _size(image))
    for position, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict):
            rows.drop("not a JSON object", position)
        elif annotation.get("iscrowd") in (1, "1"):  # True is 1
            rows.drop("of a crowd", position)
        elif (slot := slots.get(_id(annotation.get("image_id")))) is None:
            rows.drop("on an unknown image", position)
        else:
            rows.add(slot, annotation.get("bbox"), position)


def _parse(path: Path) -> dict[str, Any]:
    """The json file without its outlines: a big file is mostly segmentations, and each is let go as soon
    as its annotation is parsed. The peak is the file's bytes and text, then its text and about 400 bytes a
    box."""
    text = utf8(path.read_bytes(), str(path))
    if not text.strip():
        raise UserError(f"{path} is empty: give a COCO file with images and annotations")
    try:
        content = json.loads(text, object_hook=_needed_keys)
    except json.JSONDecodeError as error:
        place = f"{path} line {error.lineno} column {error.colno}"
        raise UserError(f"{place} is not JSON ({error.msg}): correct the file or fetch it again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON that can be read ({error}): correct the file") from None
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            wanted = 'a COCO instances file, which has "images" and "annotations"'
            raise UserError(f'{path} has no list "{key}": give {wanted}')
    return content


def _needed_keys(parsed: dict[str, Any]) -> dict[str, Any]:
    """Called by the JSON parser with each finished object: an annotation keeps only what is read."""
    if "image_id" not in parsed or "file_name" in parsed:
        return parsed
    return {key: parsed[key] for key in ("image_id", "bbox", "iscrowd") if key in parsed}


def _id(value: Any) -> str:
    """An id as text: writers disagree on 17, 17.0 and "17"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _size(image: dict[str, Any]) -> tuple[int, int]:
    """Width and height of an image entry, (0, 0) if it does not state both."""
    width, height = image.get("width"), image.get("height")
    if isinstance(width, int) and isinstance(height, int) and 0 < width < 2**31 and 0 < height < 2**31:
        return width, height
    return 0, 0
