"""The shapes of a reward in Triton, and the overlaps that they are made of.

One function a shape: (IoU, GIoU, rising threshold) -> reward of a valid box, where the threshold is
0.25 + 0.5 * progress. `REWARD_SHAPES` names them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from locus_kernels.box_reward.shapes import REWARD_SHAPES


# --------------------------------------------------------------------------------------------------- overlaps
@triton.jit
def _area(x1, y1, x2, y2):
    return tl.maximum(x2 - x1, 0.0) * tl.maximum(y2 - y1, 0.0)


@triton.jit
def overlaps(x1, y1, x2, y2, target, lane):
    """(IoU, GIoU) of the boxes with their targets, as `overlaps.iou` and `overlaps.giou`."""
    tx1, ty1 = tl.load(target, mask=lane, other=0.0), tl.load(target + 1, mask=lane, other=0.0)
    tx2, ty2 = tl.load(target + 2, mask=lane, other=0.0), tl.load(target + 3, mask=lane, other=0.0)
    inner = _area(tl.maximum(x1, tx1), tl.maximum(y1, ty1), tl.minimum(x2, tx2), tl.minimum(y2, ty2))
    union = _area(x1, y1, x2, y2) + _area(tx1, ty1, tx2, ty2) - inner
    hull = _area(tl.minimum(x1, tx1), tl.minimum(y1, ty1), tl.maximum(x2, tx2), tl.maximum(y2, ty2))
    iou = tl.div_rn(inner, tl.where(union > 0, union, 1.0))
    return iou, iou - tl.div_rn(tl.maximum(hull - union, 0.0), tl.where(hull > 0, hull, 1.0))


# ----------------------------------------------------------------------------------------------------- shapes
@triton.jit
def shape_iou(iou, giou, rising):
    return iou


@triton.jit
def shape_iou_squared(iou, giou, rising):
    return iou * iou


@triton.jit
def shape_iou_over_half(iou, giou, rising):
    return tl.where(iou > 0.5, iou, 0.0)


@triton.jit
def shape_giou(iou, giou, rising):
    return giou


@triton.jit
def shape_giou_plus_one(iou, giou, rising):
    return giou + 1.0


@triton.jit
def shape_threshold(iou, giou, rising):
    return tl.where(iou >= 0.5, 1.0, 0.0)


@triton.jit
def shape_ramp(iou, giou, rising):
    return tl.minimum(tl.maximum((iou - 0.5) * 4.0, 0.0), 1.0)


@triton.jit
def shape_rising(iou, giou, rising):
    return tl.where(iou >= rising, 1.0, 0.0)


SHAPES = {name: globals()[shape.kernel] for name, shape in REWARD_SHAPES.items()}
