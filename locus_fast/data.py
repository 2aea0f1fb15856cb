"""Object boxes from what `--data` names: a COCO json file, a JSON-lines file, or a folder of images.

All three end as one `BoxTable` of compact arrays. What cannot be used is left out, counted by reason, and shown with its first culprit; what is wrong
with the file as a whole is a UserError. Boxes are taken to be in pixels of the upright image, EXIF orientation applied, as labelling tools show it.
"""

from __future__ import annotations

import json
import os
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from locus_fast.errors import UserError
from locus_fast.images import ImageError, image_size

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"))
_CLIP_TOLERANCE = 0.01  # px: x + width of a box that touches the border misses it by rounding
_LOOKED_FOR = 20  # images whose existence is checked before anything starts
_HEADER_THREADS = 16  # reading headers waits for the disk or the network, not for a core


@dataclass(frozen=True)
class Dropped:
    """What was left out for one reason."""

    count: int
    first: str  # the first culprit: "instances.json annotations[16]" or "boxes.jsonl line 3"


@dataclass(frozen=True)
class BoxTable:
    """n boxes on m images. Images without a box stay in the table."""

    source: Path  # what was read
    root: Path  # the folder that the names are relative to
    names: list[str]  # [m], each image once
    image_index: np.ndarray  # int32 [n], rows of `names`
    boxes: np.ndarray  # float32 [n, 4], xyxy in pixels of the upright image, inside it
    sizes: np.ndarray  # int32 [m, 2], width and height; 0, 0 where not known (images without boxes)
    dropped: dict[str, Dropped]  # by reason, worded to follow a count: "reversed", "of zero area"
    clipped: int  # boxes that stuck out of their image and were cut at its border
    has_boxes: bool  # False for a folder: boxes are to be drawn at random

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / self.names[index]

    def dropped_text(self) -> str:
        """All reasons with their counts and first culprits, "" if nothing was dropped."""
        return _reasons(self.dropped)


def read_boxes(data: Path, images: Path | None) -> BoxTable:
    """Read a COCO `.json`, a `.jsonl` of {"image": name, "bbox": [x1, y1, x2, y2]} lines, or a folder of images (searched with its subfolders).

    `images` is the folder that relative image names are joined to; None is the data file's own. Raises UserError if the path, the file, the image
    folder or all of the boxes cannot be used. Image sizes that the file does not state are read from the images' headers.
    """
    data = Path(data)
    if not data.exists():
        raise UserError(f"--data {data} does not exist: give a COCO .json file, a .jsonl file or a folder of images")
    try:
        return _read_folder(data, images) if data.is_dir() else _read_file(data, images)
    except OSError as error:
        raise UserError(f"{error.filename or data} cannot be read ({error.strerror}): correct its name or its permissions") from None


def _read_file(data: Path, images: Path | None) -> BoxTable:
    suffix = data.suffix.lower()
    if suffix not in (".json", ".jsonl"):
        raise UserError(f"--data {data} is neither a COCO .json file, a .jsonl file nor a folder of images: give one of these")
    root = data.parent if images is None else Path(images)
    if not root.is_dir():
        raise UserError(f"--images {root} is not a folder: give the folder that the image names in {data} are relative to")
    rows = _Rows(data, root)
    if suffix == ".json":
        _read_coco(rows)
    else:
        _read_jsonl(rows)
    return rows.table()


def _read_folder(folder: Path, images: Path | None) -> BoxTable:
    if images is not None:
        raise UserError(f"--images {images} goes with a .json or .jsonl file, and --data {folder} is a folder of images: leave --images out")
    names: list[str] = []
    others: list[str] = []
    for here, folders, files in os.walk(folder, onerror=_raise):
        folders.sort()
        inside = Path(here).relative_to(folder)
        for file in sorted(files):
            wanted = Path(file).suffix.lower() in IMAGE_SUFFIXES and not file.startswith(".")
            (names if wanted else others).append((inside / file).as_posix())
    if not names:
        raise UserError(f"--data {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}): give a folder of images or a file of boxes")
    dropped = {"of other kinds": Dropped(len(others), others[0])} if others else {}
    image_index, boxes, sizes = np.zeros(0, np.int32), np.zeros((0, 4), np.float32), np.zeros((len(names), 2), np.int32)
    return BoxTable(folder, folder, names, image_index, boxes, sizes, dropped, clipped=0, has_boxes=False)


def _raise(error: OSError) -> None:
    raise error


def _read_coco(rows: _Rows) -> None:
    content = _parse_coco(rows.source)
    slots: dict[str, int] = {}
    for position, image in enumerate(content["images"]):
        if not isinstance(image, dict) or "id" not in image or not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise UserError(f"{rows.source} images[{position}] lacks an id or a file_name: each image needs both")
        if _id(image["id"]) in slots:
            raise UserError(f"{rows.source} images[{position}] repeats the id {image['id']!r}: each image needs an id of its own")
        slots[_id(image["id"])] = rows.image(image["file_name"], _size(image))
    for position, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict):
            rows.drop("not a JSON object", position)
        elif annotation.get("iscrowd") in (1, "1"):  # True is 1
            rows.drop("of a crowd", position)
        elif (slot := slots.get(_id(annotation.get("image_id")))) is None:
            rows.drop("on an unknown image", position)
        else:
            rows.add(slot, annotation.get("bbox"), position, is_xywh=True)


def _parse_coco(path: Path) -> dict[str, Any]:
    """The json file without its outlines: a big file is mostly segmentations, and each is let go as soon as its annotation is parsed.

    The peak is the file's bytes and text, then its text and about 400 bytes a box.
    """
    text = _text(path.read_bytes(), str(path))
    if not text.strip():
        raise UserError(f"{path} is empty: give a COCO file with images and annotations")
    try:
        content = json.loads(text, object_hook=_needed_keys)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno} column {error.colno} is not JSON ({error.msg}): mend the file or fetch it again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON that can be read ({error}): mend the file") from None
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f'{path} has no list "{key}": give a COCO instances file, which has "images" and "annotations"')
    return content


def _needed_keys(parsed: dict[str, Any]) -> dict[str, Any]:
    """Called by the JSON parser with each finished object: an annotation keeps only what is read."""
    if "image_id" not in parsed or "file_name" in parsed:
        return parsed
    return {key: parsed[key] for key in ("image_id", "bbox", "iscrowd") if key in parsed}


def _read_jsonl(rows: _Rows) -> None:
    with rows.source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{rows.source} line {number}"
            text = _text(line, where).rstrip()
            if not text:
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise UserError(f'{where} is not JSON ({reason}): each line is {{"image": name, "bbox": [x1, y1, x2, y2]}}') from None
            name = record.get("image") if isinstance(record, dict) else None
            if not isinstance(name, str) or not name or "bbox" not in record:
                raise UserError(f'{where} lacks "image" or "bbox": each line is {{"image": name, "bbox": [x1, y1, x2, y2]}}')
            rows.add(rows.image(name, (0, 0)), record["bbox"], number, is_xywh=False)
    if not rows.names:
        raise UserError(f'{rows.source} is empty: each line is {{"image": name, "bbox": [x1, y1, x2, y2]}}')


class _Rows:
    """Boxes while a file is being read; `table` checks and packs them. A position is that of the annotation or line, for messages."""

    def __init__(self, source: Path, root: Path) -> None:
        self.source = source
        self.root = root
        self.names: list[str] = []
        self._sizes: list[tuple[int, int]] = []
        self._rows_of: dict[str, int] = {}  # each spelling of a name, so that one file is never two images
        self._image_index = array("i")
        self._positions = array("q")
        self._boxes = array("d")  # xyxy
        self._dropped: dict[str, list[int]] = {}  # reason: count, first position

    def image(self, name: str, size: tuple[int, int]) -> int:
        """The row of the image called `name`, new or known; `size` is its width and height, (0, 0) if unknown."""
        row = self._rows_of.get(name)
        if row is None:
            tidy = PurePath(name)
            if tidy.is_absolute() and tidy.is_relative_to(self.root.absolute()):
                tidy = tidy.relative_to(self.root.absolute())
            row = self._rows_of.setdefault(str(tidy), len(self.names))
            self._rows_of[name] = row
            if row == len(self.names):
                self.names.append(str(tidy))
                self._sizes.append(size)
        return row

    def add(self, image: int, bbox: Any, position: int, *, is_xywh: bool) -> None:
        """Take in one box, or drop it if it is not four numbers."""
        if not isinstance(bbox, list) or len(bbox) != 4:
            return self.drop("without 4 values", position)
        if not all(type(value) in (int, float) for value in bbox):
            return self.drop("not made of numbers", position)
        try:
            a, b, c, d = map(float, bbox)
        except OverflowError:  # an integer of more than 308 digits
            return self.drop("not finite", position)
        self._boxes.extend((a, b, a + c, b + d) if is_xywh else (a, b, c, d))
        self._image_index.append(image)
        self._positions.append(position)

    def drop(self, reason: str, position: int, count: int = 1) -> None:
        """Count boxes left out for `reason`, the first of them at `position`."""
        entry = self._dropped.setdefault(reason, [0, position])
        entry[0] += count

    def table(self) -> BoxTable:
        """Check the boxes against each other's rules and their images; raises UserError if no box or no image is left."""
        boxes = np.frombuffer(self._boxes, np.float64).reshape(-1, 4)
        image_index = np.frombuffer(self._image_index, np.int32)
        positions = np.frombuffer(self._positions, np.int64)
        sizes = np.array(self._sizes, np.int32).reshape(-1, 2)
        if len(boxes):
            self._look_for_images(image_index)
            self._read_missing_sizes(sizes, np.unique(image_index))
        limits = np.tile(sizes[image_index].astype(np.float64), 2)  # [n, 4]: width, height, width, height
        inside = np.clip(boxes, 0.0, limits)
        kept = self._drop_bad(boxes, inside, limits, positions)
        if not kept.any():
            raise UserError(f"{self.source} has no box that can be used ({_reasons(self._named_drops()) or 'it lists none'}): mend the boxes")
        clipped = int((np.abs(inside[kept] - boxes[kept]) > _CLIP_TOLERANCE).any(axis=1).sum())
        packed = inside[kept].astype(np.float32)
        return BoxTable(self.source, self.root, self.names, image_index[kept], packed, sizes, self._named_drops(), clipped, has_boxes=True)

    def _drop_bad(self, boxes: np.ndarray, inside: np.ndarray, limits: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Count the boxes that cannot be used, each under its first fault; returns bool [n], the others."""
        packed = inside.astype(np.float32)  # a side that float32 cannot hold is of zero area as well
        faults = {
            "not finite": ~np.isfinite(boxes).all(axis=1),
            "reversed": (boxes[:, 2:] < boxes[:, :2]).any(axis=1),
            "of zero area": (boxes[:, 2:] == boxes[:, :2]).any(axis=1),
            "on an image that cannot be read": limits[:, 0] == 0,
            "outside the image": (inside[:, 2:] <= inside[:, :2]).any(axis=1),
            "of almost zero area": (packed[:, 2:] <= packed[:, :2]).any(axis=1),
        }
        kept = np.ones(len(boxes), bool)
        for reason, faulty in faults.items():
            culprits = positions[kept & faulty]
            if len(culprits):
                self.drop(reason, int(culprits[0]), len(culprits))
            kept &= ~faulty
        return kept

    def _named_drops(self) -> dict[str, Dropped]:
        place = "line {}" if self.source.suffix.lower() == ".jsonl" else "annotations[{}]"
        return {reason: Dropped(count, f"{self.source.name} {place.format(first)}") for reason, (count, first) in self._dropped.items()}

    def _look_for_images(self, image_index: np.ndarray) -> None:
        """Raise UserError if none of the first few images is there: then it is the folder that is wrong, not a file."""
        rows = list(dict.fromkeys(image_index.tolist()))[:_LOOKED_FOR]
        if not any((self.root / self.names[row]).is_file() for row in rows):
            first = self.root / self.names[rows[0]]
            raise UserError(f"{self.source} names images that are not there, such as {first}: give the folder they are in with --images")

    def _read_missing_sizes(self, sizes: np.ndarray, rows: np.ndarray) -> None:
        """Fill in, in place, the sizes [m, 2] of those images among `rows` that the file says nothing about; an unreadable one keeps 0, 0."""
        unknown = rows[(sizes[rows] == 0).any(axis=1)]
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            for row, size in zip(unknown, pool.map(self._header_size, unknown.tolist()), strict=True):
                sizes[row] = size

    def _header_size(self, row: int) -> tuple[int, int]:
        try:
            return image_size(self.root / self.names[row])
        except ImageError:
            return 0, 0


def _id(value: Any) -> str:
    """An id as text: writers disagree on 17, 17.0 and "17"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _size(image: dict[str, Any]) -> tuple[int, int]:
    """Width and height of a COCO image entry, (0, 0) if it does not state both."""
    width, height = image.get("width"), image.get("height")
    if isinstance(width, int) and isinstance(height, int) and 0 < width < 2**31 and 0 < height < 2**31:
        return width, height
    return 0, 0


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def _reasons(dropped: dict[str, Dropped]) -> str:
    return ", ".join(f"{entry.count:,} {reason} (first: {entry.first})" for reason, entry in dropped.items())
