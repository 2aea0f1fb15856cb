"""What the readers of every format give: boxes on images, in arrays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

OUTSIDE = "outside the image"  # a reason to drop a box


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
    names: list[str]  # [m], each path once, however it was spelled
    # int32 [m], the first row whose file holds the same bytes; its own where there is no copy
    first_copy: np.ndarray
    image_index: np.ndarray  # int32 [n], rows of `names`
    boxes: np.ndarray  # float32 [n, 4], xyxy in pixels of the upright image, inside it
    sizes: np.ndarray  # int32 [m, 2], width and height; 0, 0 where not known (images without boxes)
    dropped: dict[str, Dropped]  # by reason, worded to follow a count: "reversed", "of zero area"
    clipped: int  # boxes that stuck out of their image and were cut at its border
    astray: int  # boxes that lay outside their image, or lost more than a tenth of their area at its border
    has_boxes: bool  # False for a folder: boxes are to be drawn at random
    note: str = ""  # how the boxes were read, where that is worth saying

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / self.names[index]

    def copies(self) -> int:
        """How many images are copies of another one."""
        return int((self.first_copy != np.arange(len(self.names))).sum())

    def dropped_text(self) -> str:
        """All reasons with their counts and first culprits, "" if nothing was dropped."""
        return reasons_text(self.dropped)


def reasons_text(dropped: dict[str, Dropped]) -> str:
    """Reasons with their counts and first culprits, for a sentence."""
    return ", ".join(f"{entry.count:,} {reason} (first: {entry.first})" for reason, entry in dropped.items())
