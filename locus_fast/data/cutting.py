"""From (image, box) to a cue. The recipe is the paper's: the size class of an example is that of its object
box; tiny boxes are padded and their crops rescaled, the others are cut as they are; a crop is at least
`min_side` pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from locus_fast.errors import UserError

SIZE_CLASSES = ("tiny", "small", "large")
_TINY_BELOW, _SMALL_UP_TO = 0.01, 0.05  # parts of the image area
_RANDOM_AREA = {
    "tiny": (0.001, _TINY_BELOW),
    "small": (_TINY_BELOW, _SMALL_UP_TO),
    "large": (_SMALL_UP_TO, 0.25),
}
_RANDOM_ASPECT = 2.0  # random boxes are 1/2 to 2 times as wide as high
_LEAST_CUE_SIDE = 8  # px, after rescaling

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class CueRecipe:
    """How boxes are drawn and cut."""

    mix: tuple[float, float, float]  # weights of tiny, small and large
    min_side: int  # px, of the crop before rescaling
    # range of the padding of each side of a tiny box, as a part of the box's width or height
    padding: tuple[float, float]
    scale: tuple[float, float]  # range of the factor that a tiny crop is resized by

    def __post_init__(self) -> None:
        """Raise UserError for values that no cue can be cut by."""
        if (
            len(self.mix) != 3
            or not all(math.isfinite(weight) and weight >= 0 for weight in self.mix)
            or sum(self.mix) <= 0
        ):
            classes = ", ".join(SIZE_CLASSES)
            raise UserError(
                f"mix {self.mix} must be three weights for {classes}, none negative and not all zero"
            )
        if self.min_side < 1:
            raise UserError(f"min_side {self.min_side} must be at least 1 pixel")
        if not 0 <= self.padding[0] <= self.padding[1] < math.inf:
            raise UserError(f"padding {self.padding} must be a range from low to high, not negative")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise UserError(f"scale {self.scale} must be a range from low to high, above zero")


def size_class_of(box: Sequence[float], width: int, height: int) -> str:
    """The class of a box (xyxy in pixels) in an image: "tiny" below 1% of its area, "small" up to 5%, "large"
    above."""
    part = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
    return SIZE_CLASSES[int(class_of(np.asarray(part)))]


def class_of(part: np.ndarray) -> np.ndarray:
    """Parts of the image area, any shape, as indices into SIZE_CLASSES."""
    return np.where(part < _TINY_BELOW, 0, np.where(part <= _SMALL_UP_TO, 1, 2))


def cut_cue(
    image: np.ndarray, box: Sequence[float], size_class: str, recipe: CueRecipe, rng: np.random.Generator
) -> tuple[np.ndarray, Box]:
    """Cut what `box` (xyxy in pixels, overlapping the image) shows out of `image` (uint8 [H, W, 3]).

    Returns the cue, uint8 [h, w, 3], and the whole-pixel region of the image that it shows, xyxy: that of
    `region_of`, the box padded if tiny. Tiny crops are resized bicubically, to 8 px a side or more.
    """
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (float(value) for value in box)
    if size_class == "tiny":
        left, right = rng.uniform(*recipe.padding, size=2) * (x2 - x1)
        top, bottom = rng.uniform(*recipe.padding, size=2) * (y2 - y1)
        x1, y1, x2, y2 = x1 - left, y1 - top, x2 + right, y2 + bottom
    region = region_of(np.array((x1, y1, x2, y2)), np.array((width, height)), recipe.min_side).tolist()
    cue = image[region[1] : region[3], region[0] : region[2]].copy()
    if size_class == "tiny":
        cue = _rescaled(cue, rng.uniform(*recipe.scale))
    return cue, (float(region[0]), float(region[1]), float(region[2]), float(region[3]))


def region_of(boxes: np.ndarray, sides: np.ndarray, least: int) -> np.ndarray:
    """The whole-pixel regions [..., 4] that show boxes [..., 4], xyxy, of images of width and height `sides`
    [..., 2]: rounded outwards inside the image, grown about their centre to `least` pixels a side unless the
    image is smaller, and shifted back inside."""
    start = np.maximum(np.floor(boxes[..., :2]).astype(np.int64), 0)
    stop = np.minimum(np.ceil(boxes[..., 2:]).astype(np.int64), sides)
    side = np.minimum(np.maximum(stop - start, least), sides)
    start = np.minimum(np.maximum((start + stop - side) // 2, 0), sides - side)
    return np.concatenate((start, start + side), axis=-1)


def _rescaled(cue: np.ndarray, factor: float) -> np.ndarray:
    height, width = (max(round(side * factor), _LEAST_CUE_SIDE) for side in cue.shape[:2])
    return np.array(Image.fromarray(cue).resize((width, height), Image.Resampling.BICUBIC))


def random_box(width: int, height: int, size_class: str, min_side: int, rng: np.random.Generator) -> Box:
    """A box (xyxy in pixels) anywhere in the image, its area log-uniform within the class, from min_side
    squared on if that is still of the class."""
    low, high = _RANDOM_AREA[size_class]
    least = min_side**2 / (width * height)
    low = least if low < least < high else low
    area = width * height * math.exp(rng.uniform(math.log(low), math.log(high)))
    aspect = math.exp(rng.uniform(-math.log(_RANDOM_ASPECT), math.log(_RANDOM_ASPECT)))
    box_width = min(math.sqrt(area * aspect), width)
    box_height = min(area / box_width, height)  # a strip of an image takes a longer box, of the same area
    box_width = area / box_height
    x1, y1 = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    return x1, y1, x1 + box_width, y1 + box_height
