"""Sets of boxes that teach nothing: the loss would fall and the figures rise, and the model would have
learned one answer."""

from __future__ import annotations

import numpy as np

from locus_fast.data import BoxTable
from locus_fast.data.cutting import CueRecipe, class_of, region_of
from locus_fast.data.table import OUTSIDE
from locus_fast.errors import UserError

_MOST = 0.5  # of the examples as they are drawn, or of the boxes
_FEWEST = 4  # boxes: fewer prove nothing
_SAME = 0.75  # IoU with the median region from which on a region is the same place, give or take a pixel


def refuse_collapsed(table: BoxTable, recipe: CueRecipe) -> None:
    """Raise UserError if most boxes lie outside their images or are cut at the border, are less than a pixel
    wide and high, or show one place, in pixels or in parts of the image.

    More than half is most: a constant answer would then score 0.5 or more, and what a run reports would say
    nothing. A camera that always sees its one object at one place is refused too; boxes of several places in
    other images are what it lacks. Each size class weighs what it weighs in the mix. Regions are those that
    cues show, without padding.
    """
    if not table.has_boxes:
        return
    count = len(table.boxes) + (table.dropped[OUTSIDE].count if OUTSIDE in table.dropped else 0)
    if count >= _FEWEST and table.astray > _MOST * count:
        what = f"{table.astray:,} of {count:,} boxes lie outside their images"
        what += " or lose over a tenth of their area at the border"
        raise UserError(
            f"{table.source}: {what}: check that they were drawn on these images, and their --box-format"
        )
    boxes = table.boxes.astype(np.float64)
    sides = table.sizes[table.image_index].astype(np.int64)
    weight = _weights(boxes, sides, recipe)
    chosen = weight > 0
    if not chosen.any():
        return
    boxes, sides, weight = boxes[chosen], sides[chosen], weight[chosen]
    dots = (boxes[:, 2:] - boxes[:, :2] < 1).all(axis=1)
    if dots.sum() >= _FEWEST and weight[dots].sum() > _MOST:
        what = f"{dots.sum():,} of {len(boxes):,} boxes are less than a pixel wide and high"
        advice = "check that they are in pixels of these images, and their --box-format"
        raise UserError(f"{table.source}: {what}, and would be cues of what is around them: {advice}")
    regions = region_of(boxes, sides, recipe.min_side).astype(np.float64)
    for places, unit in ((regions, "pixels"), (regions / np.tile(sides, 2), "parts of the image")):
        middle = np.array([_median(values, weight) for values in places.T])
        same = _iou(places, middle) >= _SAME
        if same.sum() >= _FEWEST and weight[same].sum() > _MOST:
            corners = ", ".join(f"{round(value, 3):g}" for value in middle)
            what = (
                f"{same.sum():,} of {len(same):,} cues would show the same place, about [{corners}] in {unit}"
            )
            advice = "check their --box-format and --min-side, or give boxes in more places"
            raise UserError(f"{table.source}: {what}, so that one constant answer would do: {advice}")


def _weights(boxes: np.ndarray, sides: np.ndarray, recipe: CueRecipe) -> np.ndarray:
    """How probable each box is to be drawn, [n]; all zero if the mix has none of their classes."""
    classes = class_of((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) / sides.prod(axis=1))
    counts = np.bincount(classes, minlength=len(recipe.mix))
    share = np.array(recipe.mix) * (counts > 0)
    return (share / max(share.sum(), 1e-300) / np.maximum(counts, 1))[classes]


def _median(values: np.ndarray, weight: np.ndarray) -> float:
    """The weighted median. If more than half of the weight is near one value, it is near it too."""
    order = np.argsort(values)
    return float(values[order][np.searchsorted(np.cumsum(weight[order]), weight.sum() / 2)])


def _iou(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """IoU of boxes [n, 4] with one box [4], xyxy."""
    both = np.maximum(0.0, np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])).prod(axis=1)
    areas = [(part[..., 2:] - part[..., :2]).prod(axis=-1) for part in (boxes, box)]
    return both / np.maximum(areas[0] + areas[1] - both, 1e-300)
