"""What `--data` names, read by its kind.

To add a file format, write a reader like `jsonl.read_jsonl` and name it in `FORMATS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from locus_fast.data.coco import read_coco
from locus_fast.data.copies import first_copies
from locus_fast.data.jsonl import read_jsonl
from locus_fast.data.rows import Rows
from locus_fast.data.table import BoxTable, Dropped
from locus_fast.errors import UserError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
)


@dataclass(frozen=True)
class Format:
    """A kind of file that lists boxes."""

    kind: str  # what it is called, with its article
    read: Callable[[Rows], None]  # takes every image and box of `rows.source` into the rows
    boxes: str  # what its four numbers usually are, a name in `box_format.MEANING`
    place: str  # where a box stands in it, with {} for its position, to name it in a message


FORMATS = {  # by the file's suffix
    ".json": Format("a COCO .json file", read_coco, "xywh", "annotations[{}]"),
    ".jsonl": Format("a .jsonl file", read_jsonl, "xyxy", "line {}"),
}
KINDS = ", ".join(form.kind for form in FORMATS.values())


def read_boxes(data: Path, images: Path | None, box_format: str = "auto") -> BoxTable:
    """Read a COCO `.json`, a `.jsonl` of {"image": name, "bbox": four numbers} lines, or a folder of images
    (searched with its subfolders).

    images: the folder that relative image names are joined to; None is the data file's own. box_format: one
    of BOX_FORMATS; "auto" is x, y, width, height in COCO and x1, y1, x2, y2 in JSONL, and refuses a file
    whose boxes show another one. Raises UserError if the path, the file, the image folder or all of the boxes
    cannot be used. Image sizes that the file does not state are read from the images' headers, and of images
    with boxes it is found which are copies.
    """
    data = Path(data)
    if not data.exists():
        raise UserError(f"--data {data} does not exist: give {KINDS} or a folder of images")
    try:
        if data.is_dir():
            return _read_folder(data, images, box_format)
        return _read_file(data, images, box_format)
    except OSError as error:
        name = error.filename or data
        raise UserError(
            f"{name} cannot be read ({error.strerror}): correct its name or its permissions"
        ) from None


def _read_file(data: Path, images: Path | None, box_format: str) -> BoxTable:
    form = FORMATS.get(data.suffix.lower())
    if form is None:
        raise UserError(f"--data {data} is neither {KINDS} nor a folder of images: give one of these")
    root = data.parent if images is None else Path(images)
    if not root.is_dir():
        raise UserError(
            f"--images {root} is not a folder: give the folder that the image names in {data} are relative to"
        )
    rows = Rows(data, root, box_format, form.boxes, form.place)
    form.read(rows)
    return rows.table()


def _read_folder(folder: Path, images: Path | None, box_format: str) -> BoxTable:
    """All images of a folder and its subfolders, without boxes."""
    for option, value in (
        ("--images", images),
        ("--box-format", None if box_format == "auto" else box_format),
    ):
        if value is not None:
            file = "goes with a .json or .jsonl file"
            raise UserError(
                f"{option} {value} {file}, and --data {folder} is a folder of images: leave {option} out"
            )
    names: list[str] = []
    others: list[str] = []
    for here, folders, files in os.walk(folder, onerror=_raise):
        folders.sort()
        inside = Path(here).relative_to(folder)
        for file in sorted(files):
            wanted = Path(file).suffix.lower() in IMAGE_SUFFIXES and not file.startswith(".")
            (names if wanted else others).append((inside / file).as_posix())
    if not names:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(
            f"--data {folder} holds no images ({kinds}): give a folder of images or a file of boxes"
        )
    dropped = {"of other kinds": Dropped(len(others), others[0])} if others else {}
    return BoxTable(
        source=folder,
        root=folder,
        names=names,
        first_copy=first_copies([folder / name for name in names]),
        image_index=np.zeros(0, np.int32),
        boxes=np.zeros((0, 4), np.float32),
        sizes=np.zeros((len(names), 2), np.int32),
        dropped=dropped,
        clipped=0,
        astray=0,
        has_boxes=False,
    )


def _raise(error: OSError) -> None:
    raise error
