"""One cue search task, and where tasks come from. Boxes are xyxy in pixels of the image that they belong
to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Example:
    """One cue search task: find `cue` in `image`."""

    image: np.ndarray  # uint8 [height, width, 3] RGB
    cue: np.ndarray  # uint8 [height, width, 3] RGB, a rescaled copy of image[box]
    # xyxy in pixels of `image`: the region the cue shows, padding included
    box: tuple[float, float, float, float]
    size_class: str  # "tiny" (< 1% of the image area), "small" (1% to 5%) or "large"
    source: str  # where it comes from, for messages and pictures: a file name, or "scene 17"
    skipped: tuple[str, ...] = ()  # one sentence for each unreadable image that was passed over to get here


class CueSource(Protocol):
    """Where examples come from. Both methods are pure functions of (the source's seed, index): any order, any
    thread."""

    held_out_count: int

    def train(self, index: int) -> Example:
        """Training example `index`, for any index >= 0."""

    def held_out(self, index: int) -> Example:
        """Held-out example `index`, 0 <= index < held_out_count; never from an image that `train` uses."""

    def describe(self) -> str:
        """One line: how many images and boxes, of which sizes, what was left out and why."""
