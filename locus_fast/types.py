"""What flows between the modules, with shapes. Boxes are xyxy in pixels of the image they belong to unless a name says `frame`.

B prompts (groups) in a microbatch, G replies a group, R = B * G rows, L longest reply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from locus_fast.model.preprocess import PatchSpec, patches_of


@dataclass(frozen=True)
class Example:
    """One cue search task: find `cue` in `image`."""

    image: np.ndarray  # uint8 [height, width, 3] RGB
    cue: np.ndarray  # uint8 [height, width, 3] RGB, a rescaled copy of image[box]
    box: tuple[float, float, float, float]  # xyxy in pixels of `image`: the region the cue shows, padding included
    size_class: str  # "tiny" (< 1% of the image area), "small" (1% to 5%) or "large"
    source: str  # where it comes from, for messages and pictures: a file name, or "scene 17"
    skipped: tuple[str, ...] = ()  # one sentence for each unreadable image that was passed over to get here


class CueSource(Protocol):
    """Where examples come from. Both methods are pure functions of (the source's seed, index): any order, any thread."""

    held_out_count: int

    def train(self, index: int) -> Example:
        """Training example `index`, for any index >= 0."""

    def held_out(self, index: int) -> Example:
        """Held-out example `index`, 0 <= index < held_out_count; never from an image that `train` uses."""

    def describe(self) -> str:
        """One line: how many images and boxes, of which sizes, what was left out and why."""


@dataclass(frozen=True)
class Prompt:
    """One example as the model reads it."""

    ids: Tensor  # int64 [P], image placeholders expanded
    position: Tensor  # int64 [3, P]: temporal, row and column rotary positions
    pixels: Tensor  # uint8, the bytes [height, width, 3] of image and cue as resized, end to end
    grids: Tensor  # int64 [images, 3]: frames, rows, columns of patches
    spec: PatchSpec  # how patches are made of them
    target: Tensor  # float32 [4]: the true box in the family's coordinate frame
    scale: Tensor  # float32 [4]: frame units per pixel of the original image
    size_class: str
    source: str
    skipped: tuple[str, ...] = ()

    @property
    def patches(self) -> Tensor:
        """What a plain model takes, made on the host at every call: float32 [patches, 3 * frames * patch**2]. A batch makes its own on its device."""
        return patches_of(self.pixels, self.grids, self.spec)


@dataclass(frozen=True)
class Rollout:
    """What was sampled for B prompts, G replies each; row r belongs to prompt r // G."""

    ids: Tensor  # int64 [R, L]; past a reply's length a stop id
    lengths: Tensor  # int64 [R], the stop token included
    logprob: Tensor  # float32 [R, L], the sampler's; 0 past the length
