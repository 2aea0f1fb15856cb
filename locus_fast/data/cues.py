"""The file-backed source of cue search examples. Each has a generator of its own, so that it depends on
(seed, index) alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from locus_fast.data import BoxTable
from locus_fast.data.cutting import SIZE_CLASSES, CueRecipe, class_of, cut_cue, random_box, size_class_of
from locus_fast.data.example import Example
from locus_fast.data.images import ImageError, load_rgb
from locus_fast.data.split import Split, ranked_pictures, split_boxes, split_images
from locus_fast.errors import UserError

_MOST_FAILURES = 50  # unusable images in a row
_HELD_OUT_STREAM = (0x68656C64, 0x6F757400)  # never the start of a training stream, which is (seed, index)


class FileCues:
    """Examples from a BoxTable; a `locus_fast.data.example.CueSource`.

    Pictures are held out whole, whatever their files are called (`locus_fast.data.split`). The choice depends
    on the data and the recipe, not on the training seed. If none of the images that would be asked can be
    used, the next in rank are held out instead, and those that cannot be used are on neither side. A table
    without boxes gets random ones.

    Boxes belong to the upright image (EXIF orientation applied): an image whose decoded size is not the
    table's is passed over, as an unreadable one is.
    """

    held_out_count: int

    def __init__(self, table: BoxTable, recipe: CueRecipe, seed: int, held_out: int) -> None:
        """`held_out` is how many held-out examples are wanted. Decodes held-out images until one can be used.
        Raises UserError if the mix has no boxes, if fewer than two pictures are usable, or if none of 50 can
        be held out."""
        self._table = table
        self._recipe = recipe
        self._seed = seed
        self._failures: dict[int, str] = {}  # held-out images that cannot be used, and why
        weights = np.array(recipe.mix, np.float64)
        split_of: Callable[[np.ndarray], Split]
        if table.has_boxes:
            sides = table.boxes[:, 2:].astype(np.float64) - table.boxes[:, :2]
            self._classes = class_of(
                sides.prod(axis=1) / table.sizes[table.image_index].astype(np.float64).prod(axis=1)
            )
            self._refuse_empty_mix(weights)
            of_box = table.first_copy[table.image_index]
            pictures = np.unique(of_box[weights[self._classes] > 0])
            split_of = partial(
                split_boxes, pictures=of_box, classes=self._classes, weights=weights, held_out=held_out
            )
        else:
            pictures = np.unique(table.first_copy)
            split_of = partial(split_images, held_out=held_out)
        self._split = self._usable_split(ranked_pictures(table, pictures), split_of)
        self.held_out_count = self._split.held_count
        weights *= [len(pool) > 0 for pool in self._split.pools]
        self._weights = weights / weights.sum()  # of the size classes that have training boxes

    def _refuse_empty_mix(self, weights: np.ndarray) -> None:
        if not (np.bincount(self._classes, minlength=len(SIZE_CLASSES)) * weights).any():
            mix = f"--mix {self._recipe.mix} (weights of {', '.join(SIZE_CLASSES)})"
            lacks = f"asks only for sizes that {self._table.source} lacks ({self._counted_sizes()})"
            raise UserError(f"{mix} {lacks}: change --mix")

    def _usable_split(self, ranked: np.ndarray, split_of: Callable[[np.ndarray], Split]) -> Split:
        """The split of the pictures in their order, without those at its front if none of them could be
        asked."""
        self._passed_over: list[str] = []
        while True:
            if len(ranked) < 2:
                raise self._too_few(len(ranked))
            split = split_of(ranked)
            if not len(split.held_choices) or any(map(self._is_usable, self._images_of(split))):
                return split
            self._passed_over = list(self._failures.values())
            if len(self._passed_over) >= _MOST_FAILURES:
                raise _too_many_failures(self._table.source, self._passed_over)
            ranked = ranked[~np.isin(ranked, self._table.first_copy[list(self._failures)])]

    def _images_of(self, split: Split) -> list[int]:
        """The images that held-out choices are on, each once."""
        return list(dict.fromkeys(self._image_of(choice) for choice in split.held_choices.tolist()))

    def _is_usable(self, image: int) -> bool:
        try:
            self._load(image)
        except ImageError as error:
            self._failures[image] = str(error)
            return False
        return True

    def _too_few(self, count: int) -> UserError:
        why = "; copies of one file count once" if self._table.copies() else ""
        if self._passed_over:
            images = _counted(len(self._passed_over), "image")
            why += f"; {images} cannot be used, the last: {self._passed_over[-1]}"
        found = f"{self._table.source} has only {_counted(count, 'usable image')}"
        return UserError(f"{found}: give two or more, as one is held out{why}")

    def train(self, index: int) -> Example:
        """Training example `index` >= 0; raises UserError after 50 unusable images in a row."""
        rng = np.random.default_rng([self._seed, index])
        skipped: list[str] = []
        while len(skipped) < _MOST_FAILURES:
            wanted = self._draw_class(rng)
            try:
                return self._example(
                    int(rng.choice(self._split.pools[wanted])), SIZE_CLASSES[wanted], rng, skipped
                )
            except ImageError as error:
                skipped.append(str(error))
        raise _too_many_failures(self._table.source, skipped)

    def held_out(self, index: int) -> Example:
        """Held-out example `index`, 0 <= index < held_out_count; the next one instead if its image is
        unusable, UserError if no image is left. An image that failed once is not tried again."""
        if not 0 <= index < self.held_out_count:
            raise IndexError(f"held-out example {index} of {self.held_out_count}")
        rng = np.random.default_rng([index, *_HELD_OUT_STREAM])
        skipped = list(self._passed_over) if index == 0 else []
        unusable: set[int] = set()
        for choice in np.roll(self._split.held_choices, -index).tolist():
            image = self._image_of(choice)
            if image in unusable:
                continue
            wanted = self._classes[choice] if self._table.has_boxes else self._draw_class(rng)
            try:
                if image in self._failures:
                    raise ImageError(self._failures[image])
                return self._example(choice, SIZE_CLASSES[wanted], rng, skipped)
            except ImageError as error:
                self._failures[image] = str(error)
                skipped.append(str(error))
                unusable.add(image)
        raise _too_many_failures(self._table.source, skipped)

    def _draw_class(self, rng: np.random.Generator) -> int:
        return int(rng.choice(len(SIZE_CLASSES), p=self._weights))

    def _image_of(self, choice: int) -> int:
        return int(self._table.image_index[choice]) if self._table.has_boxes else choice

    def _example(self, choice: int, size_class: str, rng: np.random.Generator, skipped: list[str]) -> Example:
        """Load the image and cut the chosen box, or a random one; raises ImageError if the image cannot
        serve."""
        index = self._image_of(choice)
        image = self._load(index)
        height, width = image.shape[:2]
        drawn = (
            None
            if self._table.has_boxes
            else random_box(width, height, size_class, self._recipe.min_side, rng)
        )
        cue, region = cut_cue(
            image, drawn or self._table.boxes[choice].tolist(), size_class, self._recipe, rng
        )
        if drawn:  # growth to the shortest side may have lifted a random box out of its class
            size_class = size_class_of(region, width, height)
        return Example(image, cue, region, size_class, self._table.names[index], tuple(skipped))

    def _load(self, index: int) -> np.ndarray:
        """The image, uint8 [height, width, 3]. Raises ImageError if it cannot be read, is smaller than a
        crop, or is not of the table's size: boxes drawn on an image of another size (resized, or turned
        since) show something else."""
        path = self._table.path(index)
        image = load_rgb(path)
        height, width = image.shape[:2]
        if min(width, height) < self._recipe.min_side:
            crop = f"too small for a crop of {self._recipe.min_side} pixels"
            raise ImageError(f"image {path} is {width}x{height} pixels, {crop}: remove it")
        stated = self._table.sizes[index].tolist()
        if self._table.has_boxes and stated != [width, height]:
            found = f"image {path} is {width}x{height} pixels upright"
            meant = f"its boxes are for {stated[0]}x{stated[1]}"
            raise ImageError(f"{found} but {meant}: give the image that they were drawn on")
        return image

    def describe(self) -> str:
        """One line: images, boxes by size, what is held out, and what was left out and why."""
        table = self._table
        copies = f" ({_counted(table.copies(), 'copy')} of others)" if table.copies() else ""
        pictures = _counted(len(self._split.held_pictures), "image")
        held = f"{_counted(self.held_out_count, 'box')} on {pictures} held out"
        if self._passed_over:
            held += f", in place of {_counted(len(self._passed_over), 'image')} that cannot be used"
        left_out = sum(entry.count for entry in table.dropped.values())
        if not table.has_boxes:
            files = f"; left out {_counted(left_out, 'file')}: {table.dropped_text()}" if left_out else ""
            return f"{_counted(len(table.names), 'image')}{copies}, random boxes, {held}{files}"
        empty = len(table.names) - len(np.unique(table.image_index))
        images = (
            f"{_counted(len(table.names), 'image')}{f' ({empty:,} without boxes)' if empty else ''}{copies}"
        )
        line = f"{images}, {_counted(len(table.boxes), 'box')} ({self._counted_sizes()}), {held}"
        lacking = [
            name
            for name, asked, given in zip(SIZE_CLASSES, self._recipe.mix, self._weights, strict=True)
            if asked and not given
        ]
        if lacking:
            mix = ", ".join(
                f"{weight:.0%} {name}"
                for name, weight in zip(SIZE_CLASSES, self._weights, strict=True)
                if weight
            )
            line += f"; no {' or '.join(lacking)} boxes to train on, so the mix is {mix}"
        if table.note:
            line += f"; {table.note}"
        if table.clipped:
            line += f"; clipped {_counted(table.clipped, 'box')} to the image"
        if left_out:
            line += f"; dropped {_counted(left_out, 'box')}: {table.dropped_text()}"
        return line

    def _counted_sizes(self) -> str:
        counts = np.bincount(self._classes, minlength=len(SIZE_CLASSES))
        return ", ".join(f"{count:,} {name}" for count, name in zip(counts, SIZE_CLASSES, strict=True))


def _counted(count: int, noun: str) -> str:
    plural = {"box": "boxes", "copy": "copies", "try": "tries"}.get(noun, f"{noun}s")
    return f"{count:,} {noun if count == 1 else plural}"


def _too_many_failures(source: Path, skipped: list[str]) -> UserError:
    return UserError(
        f"{source}: {_counted(len(skipped), 'try')} in a row gave no usable image, the last: {skipped[-1]}"
    )
