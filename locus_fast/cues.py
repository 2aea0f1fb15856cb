"""From (image, box) to a cue, and the file-backed source of cue search examples.

The recipe is the paper's: the size class of an example is that of its object box; tiny boxes are padded and their crops rescaled, the others are cut
as they are; a crop is at least `min_side` pixels. Each example has its own generator, so that it depends on (seed, index) alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from locus_fast.data import BoxTable
from locus_fast.errors import UserError
from locus_fast.images import ImageError, load_rgb
from locus_fast.types import Example

SIZE_CLASSES = ("tiny", "small", "large")
_TINY_BELOW, _SMALL_UP_TO = 0.01, 0.05  # parts of the image area
_RANDOM_AREA = {"tiny": (0.001, _TINY_BELOW), "small": (_TINY_BELOW, _SMALL_UP_TO), "large": (_SMALL_UP_TO, 0.25)}
_RANDOM_ASPECT = 2.0  # random boxes are 1/2 to 2 times as wide as high
_LEAST_CUE_SIDE = 8  # px, after rescaling
_MOST_FAILURES = 50  # unusable images in a row
_HELD_OUT_PART = 0.2  # of the usable images, at most
_HELD_OUT_STREAM = (0x68656C64, 0x6F757400)  # never the start of a training stream, which is (seed, index)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class CueRecipe:
    """How boxes are drawn and cut."""

    mix: tuple[float, float, float]  # weights of tiny, small and large
    min_side: int  # px, of the crop before rescaling
    padding: tuple[float, float]  # range of the padding of each side of a tiny box, as a part of the box's width or height
    scale: tuple[float, float]  # range of the factor that a tiny crop is resized by

    def __post_init__(self) -> None:
        """Raise UserError for values that no cue can be cut by."""
        if len(self.mix) != 3 or not all(math.isfinite(weight) and weight >= 0 for weight in self.mix) or sum(self.mix) <= 0:
            raise UserError(f"mix {self.mix} must be three weights for {', '.join(SIZE_CLASSES)}, none negative and not all zero")
        if self.min_side < 1:
            raise UserError(f"min_side {self.min_side} must be at least 1 pixel")
        if not 0 <= self.padding[0] <= self.padding[1] < math.inf:
            raise UserError(f"padding {self.padding} must be a range from low to high, not negative")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise UserError(f"scale {self.scale} must be a range from low to high, above zero")


def size_class_of(box: Sequence[float], width: int, height: int) -> str:
    """The class of a box (xyxy in pixels) in an image: "tiny" below 1% of its area, "small" up to 5%, "large" above."""
    part = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
    return SIZE_CLASSES[int(_class_of(np.asarray(part)))]


def _class_of(part: np.ndarray) -> np.ndarray:
    """Parts of the image area, any shape, as indices into SIZE_CLASSES."""
    return np.where(part < _TINY_BELOW, 0, np.where(part <= _SMALL_UP_TO, 1, 2))


def cut_cue(image: np.ndarray, box: Sequence[float], size_class: str, recipe: CueRecipe, rng: np.random.Generator) -> tuple[np.ndarray, Box]:
    """Cut what `box` (xyxy in pixels, overlapping the image) shows out of `image` (uint8 [H, W, 3]).

    Returns the cue, uint8 [h, w, 3], and the whole-pixel region of the image that it shows, xyxy. The region covers the box (padded if tiny), is at
    least `min_side` on each side unless the image itself is smaller, and lies inside the image. Tiny crops are resized bicubically, to 8 px a side
    or more.
    """
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (float(value) for value in box)
    if size_class == "tiny":
        left, right = rng.uniform(*recipe.padding, size=2) * (x2 - x1)
        top, bottom = rng.uniform(*recipe.padding, size=2) * (y2 - y1)
        x1, y1, x2, y2 = x1 - left, y1 - top, x2 + right, y2 + bottom
    left_edge, right_edge = _span(x1, x2, width, recipe.min_side)
    top_edge, bottom_edge = _span(y1, y2, height, recipe.min_side)
    cue = image[top_edge:bottom_edge, left_edge:right_edge].copy()
    if size_class == "tiny":
        cue = _rescaled(cue, rng.uniform(*recipe.scale))
    return cue, (float(left_edge), float(top_edge), float(right_edge), float(bottom_edge))


def _span(low: float, high: float, limit: int, least: int) -> tuple[int, int]:
    """Round low..high outwards to whole pixels inside 0..limit, then grow it about its centre to `least` and shift it back inside."""
    start, stop = max(0, math.floor(low)), min(limit, math.ceil(high))
    side = min(max(stop - start, least), limit)
    start = min(max((start + stop - side) // 2, 0), limit - side)
    return start, start + side


def _rescaled(cue: np.ndarray, factor: float) -> np.ndarray:
    height, width = (max(round(side * factor), _LEAST_CUE_SIDE) for side in cue.shape[:2])
    return np.array(Image.fromarray(cue).resize((width, height), Image.Resampling.BICUBIC))


def _random_box(width: int, height: int, size_class: str, min_side: int, rng: np.random.Generator) -> Box:
    """A box (xyxy in pixels) anywhere in the image, its area log-uniform within the class, from min_side squared on if that is still of the class."""
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


class FileCues:
    """Examples from a BoxTable; a `locus_fast.types.CueSource`.

    Images are held out whole: ranked by a hash of their names, taken from the front until they give `held_out` boxes of the wanted mix, and never
    more than a fifth of them. The choice depends on the data and the recipe, not on the training seed. A table without boxes gets random ones.
    Boxes belong to the upright image (EXIF orientation applied): an image whose decoded size is not the table's is passed over, as an unreadable one
    is. Below, a choice is a box of the table, or for a table without boxes an image.
    """

    held_out_count: int

    def __init__(self, table: BoxTable, recipe: CueRecipe, seed: int, held_out: int) -> None:
        """`held_out` is how many held-out examples are wanted; raises UserError if the mix has no boxes or fewer than two images are usable."""
        self._table = table
        self._recipe = recipe
        self._seed = seed
        weights = np.array(recipe.mix, np.float64)
        if table.has_boxes:
            self._split_boxes(weights, held_out)
        else:
            self._split_images(held_out)
        weights *= [len(pool) > 0 for pool in self._pools]
        self._weights = weights / weights.sum()  # of the size classes that have training boxes

    def _split_images(self, held_out: int) -> None:
        """Without boxes: any image gives any number of random boxes of every class."""
        ranked = self._ranked(np.arange(len(self._table.names)))
        images = min(held_out, _most_held_out(len(ranked)))
        self._held_images = self._held_choices = ranked[:images]
        self._pools = [ranked[images:]] * len(SIZE_CLASSES)
        self.held_out_count = held_out

    def _split_boxes(self, weights: np.ndarray, held_out: int) -> None:
        table = self._table
        sides = table.boxes[:, 2:].astype(np.float64) - table.boxes[:, :2]
        self._classes = _class_of(sides.prod(axis=1) / table.sizes[table.image_index].astype(np.float64).prod(axis=1))
        counts = np.bincount(self._classes, minlength=len(SIZE_CLASSES))
        if not (counts * weights).any():
            mix = f"--mix {self._recipe.mix} (weights of {', '.join(SIZE_CLASSES)})"
            raise UserError(f"{mix} asks only for sizes that {table.source} lacks ({self._counted_sizes()}): change --mix")
        eligible = np.flatnonzero(weights[self._classes] > 0)
        ranked = self._ranked(np.unique(table.image_index[eligible]))
        rank = np.full(len(table.names), len(ranked))
        rank[ranked] = np.arange(len(ranked))
        eligible = eligible[np.argsort(rank[table.image_index[eligible]], kind="stable")]
        ranks, classes = rank[table.image_index[eligible]], self._classes[eligible]
        quota = _shares(weights * (counts > 0), held_out)
        images = _images_to_hold_out(ranks, classes, quota, len(ranked))
        held = ranks < images
        self._held_images = ranked[:images]
        self._held_choices = _pick(eligible[held], classes[held], quota)
        self._pools = [np.sort(eligible[~held & (classes == index)]) for index in range(len(SIZE_CLASSES))]
        self.held_out_count = len(self._held_choices)

    def _ranked(self, images: np.ndarray) -> np.ndarray:
        """Image indices in the order of a hash of their names, which no seed, folder or order in the file changes."""
        if len(images) < 2:
            raise UserError(f"{self._table.source} has only {_counted(len(images), 'usable image')}: give two or more, as one is held out")
        names = self._table.names
        return np.array(sorted(images.tolist(), key=lambda image: hashlib.sha256(names[image].encode("utf-8", "surrogatepass")).digest()))

    def train(self, index: int) -> Example:
        """Training example `index` >= 0; raises UserError after 50 unusable images in a row."""
        rng = np.random.default_rng([self._seed, index])
        skipped: list[str] = []
        while len(skipped) < _MOST_FAILURES:
            wanted = self._draw_class(rng)
            try:
                return self._example(int(rng.choice(self._pools[wanted])), SIZE_CLASSES[wanted], rng, skipped)
            except ImageError as error:
                skipped.append(str(error))
        raise _too_many_failures(self._table.source, skipped)

    def held_out(self, index: int) -> Example:
        """Held-out example `index`, 0 <= index < held_out_count; the next one instead if its image is unusable, UserError if no image is left."""
        if not 0 <= index < self.held_out_count:
            raise IndexError(f"held-out example {index} of {self.held_out_count}")
        rng = np.random.default_rng([index, *_HELD_OUT_STREAM])
        skipped: list[str] = []
        unusable: set[int] = set()
        for choice in np.roll(self._held_choices, -index).tolist():
            if self._image_of(choice) in unusable:
                continue
            wanted = self._classes[choice] if self._table.has_boxes else self._draw_class(rng)
            try:
                return self._example(choice, SIZE_CLASSES[wanted], rng, skipped)
            except ImageError as error:
                skipped.append(str(error))
                unusable.add(self._image_of(choice))
            if len(skipped) == _MOST_FAILURES:
                break
        raise _too_many_failures(self._table.source, skipped)

    def _draw_class(self, rng: np.random.Generator) -> int:
        return int(rng.choice(len(SIZE_CLASSES), p=self._weights))

    def _image_of(self, choice: int) -> int:
        return int(self._table.image_index[choice]) if self._table.has_boxes else choice

    def _example(self, choice: int, size_class: str, rng: np.random.Generator, skipped: list[str]) -> Example:
        """Load the image and cut the chosen box, or a random one; raises ImageError if the image cannot serve."""
        image_index = self._image_of(choice)
        path = self._table.path(image_index)
        image = load_rgb(path)
        height, width = image.shape[:2]
        if min(width, height) < self._recipe.min_side:
            raise ImageError(f"image {path} is {width}x{height} pixels, too small for a crop of {self._recipe.min_side} pixels: remove it")
        if self._table.has_boxes:
            self._refuse_other_size(path, width, height, image_index)
            box = self._table.boxes[choice].tolist()
        else:
            box = _random_box(width, height, size_class, self._recipe.min_side, rng)
        cue, region = cut_cue(image, box, size_class, self._recipe, rng)
        if not self._table.has_boxes:  # growth to the shortest side may have lifted a random box out of its class
            size_class = size_class_of(region, width, height)
        return Example(image, cue, region, size_class, self._table.names[image_index], tuple(skipped))

    def _refuse_other_size(self, path: Path, width: int, height: int, image_index: int) -> None:
        """Boxes drawn on an image of another size (resized, or turned since) show something else: such an image is not used."""
        stated_width, stated_height = self._table.sizes[image_index].tolist()
        if (stated_width, stated_height) != (width, height):
            stated = f"{stated_width}x{stated_height}"
            raise ImageError(
                f"image {path} is {width}x{height} pixels upright but its boxes are for {stated}: give the image that they were drawn on"
            )

    def describe(self) -> str:
        """One line: images, boxes by size, what is held out, and what was left out and why."""
        table = self._table
        held = f"{_counted(self.held_out_count, 'box')} on {_counted(len(self._held_images), 'image')} held out"
        left_out = sum(entry.count for entry in table.dropped.values())
        if not table.has_boxes:
            files = f"; left out {_counted(left_out, 'file')}: {table.dropped_text()}" if left_out else ""
            return f"{_counted(len(table.names), 'image')}, random boxes, {held}{files}"
        empty = len(table.names) - len(np.unique(table.image_index))
        without = f" ({empty:,} without boxes)" if empty else ""
        line = f"{_counted(len(table.names), 'image')}{without}, {_counted(len(table.boxes), 'box')} ({self._counted_sizes()}), {held}"
        lacking = [name for name, asked, given in zip(SIZE_CLASSES, self._recipe.mix, self._weights, strict=True) if asked and not given]
        if lacking:
            mix = ", ".join(f"{weight:.0%} {name}" for name, weight in zip(SIZE_CLASSES, self._weights, strict=True) if weight)
            line += f"; no {' or '.join(lacking)} boxes to train on, so the mix is {mix}"
        if table.clipped:
            line += f"; clipped {_counted(table.clipped, 'box')} to the image"
        if left_out:
            line += f"; dropped {_counted(left_out, 'box')}: {table.dropped_text()}"
        return line

    def _counted_sizes(self) -> str:
        counts = np.bincount(self._classes, minlength=len(SIZE_CLASSES))
        return ", ".join(f"{count:,} {name}" for count, name in zip(counts, SIZE_CLASSES, strict=True))


def _images_to_hold_out(ranks: np.ndarray, classes: np.ndarray, quota: np.ndarray, images: int) -> int:
    """How many of the first images give the quota [3] of boxes, at most a fifth of them and at least one; 0 if none are wanted.

    ranks and classes are the image's rank and the size class of each box [n]. A class too rare to fill its quota asks for a fifth of its boxes.
    """
    if not quota.any():
        return 0
    given = np.bincount(ranks * len(quota) + classes, minlength=images * len(quota)).reshape(images, -1).cumsum(axis=0)  # [images, 3]
    wanted = np.minimum(quota, np.floor(_HELD_OUT_PART * given[-1]))
    enough = (given >= wanted).all(axis=1) & (given.sum(axis=1) >= quota.sum())
    first = int(enough.argmax()) + 1 if enough.any() else images
    return min(first, _most_held_out(images))


def _most_held_out(images: int) -> int:
    return max(1, int(_HELD_OUT_PART * images))


def _shares(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers [k] that add up to `total`, in proportion to `weights` [k]; the largest remainders are rounded up."""
    exact = weights / weights.sum() * total
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    return shares


def _pick(boxes: np.ndarray, classes: np.ndarray, quota: np.ndarray) -> np.ndarray:
    """Of `boxes` [n] the first quota[c] of each class c, short classes made up from the others while there are any; in their order."""
    place = np.zeros(len(boxes), np.int64)  # how many of its own class come before each box
    for index in range(3):
        mine = classes == index
        place[mine] = np.arange(mine.sum())
    over = place >= quota[classes]
    chosen = np.argsort(over, kind="stable")[: quota.sum()]
    return boxes[np.sort(chosen)]


def _counted(count: int, noun: str) -> str:
    plural = {"box": "boxes"}.get(noun, f"{noun}s")
    return f"{count:,} {noun if count == 1 else plural}"


def _too_many_failures(source: Path, skipped: list[str]) -> UserError:
    return UserError(f"{source}: {len(skipped)} tries in a row gave no usable image, the last: {skipped[-1]}")
