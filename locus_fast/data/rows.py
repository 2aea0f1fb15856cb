"""Images and boxes while a file is being read, and the checks that make a table of them."""

from __future__ import annotations

import os
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from locus_fast.data.box_format import MEANING, check_standard, to_xyxy
from locus_fast.data.copies import first_copies
from locus_fast.data.images import ImageError, image_size
from locus_fast.data.table import OUTSIDE, BoxTable, Dropped, reasons_text
from locus_fast.errors import UserError

_CLIP_TOLERANCE = 0.01  # px: x + width of a box that touches the border misses it by rounding
_ASTRAY = 0.1  # part of a box's area that is lost at the border: more is no hasty label
_LOOKED_FOR = 20  # images whose existence is checked before anything starts
_HEADER_THREADS = 16  # reading headers waits for the disk or the network, not for a core


class Rows:
    """Boxes of a file; `table` checks and packs them. A position is that of the annotation or line, for
    messages."""

    def __init__(self, source: Path, root: Path, box_format: str, standard: str, place: str) -> None:
        """root: the folder that relative names are joined to; box_format: one of BOX_FORMATS; standard: what
        four numbers in such a file usually are, a name in `box_format.MEANING`; place: how a position is
        named, with {}."""
        self.source = source
        self.root = root
        self.names: list[str] = []
        self._asked = box_format
        self._standard, self._where = standard, place
        self._names = _Names(root)
        self._sizes: list[tuple[int, int]] = []
        self._rows_of: dict[str, int] = {}  # of each spelling and path
        self._image_index = array("i")
        self._positions = array("q")
        self._boxes = array("d")  # as the file has them
        self._dropped: dict[str, list[int]] = {}  # reason: count, first position

    def image(self, name: str, size: tuple[int, int]) -> int:
        """The row of the image called `name`, new or known; `size` is its width and height, (0, 0) if
        unknown."""
        row = self._rows_of.get(name)
        if row is None:
            tidy, path = self._names.tidy(name)
            row = self._rows_of.setdefault(path, len(self.names))
            self._rows_of[name] = row
            if row == len(self.names):
                self.names.append(tidy)
                self._sizes.append(size)
            elif not os.path.isabs(tidy):  # whichever spelling comes first
                self.names[row] = tidy
        return row

    def add(self, image: int, bbox: Any, position: int) -> None:
        """Take in one box, or drop it if it is not four numbers."""
        if not isinstance(bbox, list) or len(bbox) != 4:
            return self.drop("without 4 values", position)
        if not all(type(value) in (int, float) for value in bbox):
            return self.drop("not made of numbers", position)
        try:
            self._boxes.extend(map(float, bbox))
        except OverflowError:  # an integer of more than 308 digits
            del self._boxes[4 * len(self._positions) :]
            return self.drop("not finite", position)
        self._image_index.append(image)
        self._positions.append(position)

    def drop(self, reason: str, position: int, count: int = 1) -> None:
        """Count boxes left out for `reason`, the first of them at `position`."""
        entry = self._dropped.setdefault(reason, [0, position])
        entry[0] += count

    def table(self) -> BoxTable:
        """Check the boxes against each other's rules and their images. Raises UserError if no box or no image
        is left, or if the boxes as a whole are in another format."""
        raw = np.frombuffer(self._boxes, np.float64).reshape(-1, 4)
        image_index = np.frombuffer(self._image_index, np.int32)
        sizes = np.array(self._sizes, np.int32).reshape(-1, 2)
        if len(raw):
            self._look_for_images(image_index)
            self._read_missing_sizes(sizes, np.unique(image_index))
        sides = sizes[image_index].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # what is not finite is counted
            boxes, note = self._xyxy(raw, sides)
            limits = np.tile(sides, 2)
            inside = np.clip(boxes, 0.0, limits)
            kept = self._drop_bad(boxes, inside, limits)
            astray = _share_lost(boxes, inside) > _ASTRAY
        dropped = self._named_drops()
        if not kept.any():
            why = reasons_text(dropped) or "it lists none"
            advice = "correct the boxes, or give their --box-format"
            raise UserError(f"{self.source} has no box that can be used ({why}): {advice}")
        outside = dropped[OUTSIDE].count if OUTSIDE in dropped else 0
        return BoxTable(
            source=self.source,
            root=self.root,
            names=self.names,
            first_copy=self._first_copies(np.unique(image_index[kept])),
            image_index=image_index[kept],
            boxes=inside[kept].astype(np.float32),
            sizes=sizes,
            dropped=dropped,
            clipped=int((np.abs(inside[kept] - boxes[kept]) > _CLIP_TOLERANCE).any(axis=1).sum()),
            astray=int(astray[kept].sum()) + outside,
            has_boxes=True,
            note=note,
        )

    def _xyxy(self, raw: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, str]:
        """The boxes [n, 4] as xyxy in pixels, and what to say of how they were read. On an image of unknown
        size, whose boxes are dropped, shares stay as they are."""
        if self._asked != "auto":
            note = f"boxes read as {MEANING[self._asked]}" if self._asked != self._standard else ""
            return to_xyxy(raw, np.where(sides > 0, sides, 1.0), self._asked), note
        note = check_standard(
            raw,
            sides,
            self._standard,
            str(self.source),
            lambda chosen: self._place(self._positions[chosen[0]]),
        )
        return to_xyxy(raw, sides, self._standard), note

    def _drop_bad(self, boxes: np.ndarray, inside: np.ndarray, limits: np.ndarray) -> np.ndarray:
        """Count the boxes that cannot be used, each under its first fault; returns bool [n], the others."""
        packed = inside.astype(np.float32)  # a side that float32 cannot hold is of zero area as well
        positions = np.frombuffer(self._positions, np.int64)
        faults = {
            "not finite": ~np.isfinite(boxes).all(axis=1),
            "reversed": (boxes[:, 2:] < boxes[:, :2]).any(axis=1),
            "of zero area": (boxes[:, 2:] == boxes[:, :2]).any(axis=1),
            "on an image that cannot be read": limits[:, 0] == 0,
            OUTSIDE: (inside[:, 2:] <= inside[:, :2]).any(axis=1),
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
        return {
            reason: Dropped(count, self._place(first)) for reason, (count, first) in self._dropped.items()
        }

    def _place(self, position: int) -> str:
        return f"{self.source.name} {self._where.format(position)}"

    def _first_copies(self, rows: np.ndarray) -> np.ndarray:
        """For each image the first one among `rows` with the same bytes, int32 [m]; others are not looked
        at."""
        first = np.arange(len(self.names), dtype=np.int32)
        first[rows] = rows[first_copies([self.root / self.names[row] for row in rows.tolist()])]
        return first

    def _look_for_images(self, image_index: np.ndarray) -> None:
        """Raise UserError if none of the first few images is there: then it is the folder that is wrong, not
        a file."""
        rows = list(dict.fromkeys(image_index.tolist()))[:_LOOKED_FOR]
        if not any((self.root / self.names[row]).is_file() for row in rows):
            first = self.root / self.names[rows[0]]
            advice = "give the folder they are in with --images"
            raise UserError(f"{self.source} names images that are not there, such as {first}: {advice}")

    def _read_missing_sizes(self, sizes: np.ndarray, rows: np.ndarray) -> None:
        """Fill in, in place, the sizes [m, 2] of those images among `rows` that the file says nothing about;
        an unreadable one keeps 0, 0."""
        unknown = rows[(sizes[rows] == 0).any(axis=1)]
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            for row, size in zip(unknown, pool.map(self._header_size, unknown.tolist()), strict=True):
                sizes[row] = size

    def _header_size(self, row: int) -> tuple[int, int]:
        try:
            return image_size(self.root / self.names[row])
        except ImageError:
            return 0, 0


class _Names:
    """Spellings of image names: `./a.png`, `../pool/a.png` and `/data/pool/a.png` may be one file."""

    def __init__(self, root: Path) -> None:
        self._root = os.path.abspath(root)
        # folders with "..": whether the path without it is the same folder
        self._straight: dict[str, bool] = {}

    def tidy(self, name: str) -> tuple[str, str]:
        """(the name without detours, the absolute path that all spellings of it share). The name is relative
        to the root where `name` is or where it lies inside; other absolute names stay so, since the order
        that pictures are held out in hangs on names, and these do not change when the data file is moved."""
        spelled = os.path.join(self._root, name)
        if ".." in PurePath(name).parts and not self._is_straight(os.path.dirname(spelled)):
            return name, spelled
        path = os.path.normpath(spelled)
        if os.path.isabs(name) and not PurePath(path).is_relative_to(self._root):
            return path, path
        return os.path.relpath(path, self._root), path

    def _is_straight(self, folder: str) -> bool:
        """Whether "there/.." may be left out of a path: not where `there` is a symbolic link to somewhere
        else."""
        if folder not in self._straight:
            try:
                self._straight[folder] = os.path.samefile(folder, os.path.normpath(folder))
            except (OSError, ValueError):  # not there, or no path
                self._straight[folder] = False
        return self._straight[folder]


def _share_lost(boxes: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Part of each box's area [n] that lies outside its image; nan for what is no box."""
    whole, left = ((part[:, 2:] - part[:, :2]).prod(axis=1) for part in (boxes, inside))
    return 1 - left / whole


def utf8(content: bytes, where: str) -> str:
    """Text of bytes, without a byte order mark; raises UserError that names the place."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
