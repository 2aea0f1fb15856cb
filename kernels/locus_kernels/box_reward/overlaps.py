"""Overlaps of boxes, xyxy [..., 4], elementwise."""

from __future__ import annotations

import torch
from torch import Tensor


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas [...] of the intersection and of the union of two boxes [..., 4]; a box whose sides are not
    positive has area 0."""
    width, height = (
        (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]))
        .clamp(min=0)
        .unbind(-1)
    )
    intersection = width * height
    area_a, area_b = ((box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b))
    return intersection, area_a + area_b - intersection


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [...] in [0, 1] of xyxy boxes [..., 4], elementwise; 0 where either box is
    degenerate, never NaN.

    Stretching an axis for both boxes alike leaves it unchanged, so boxes in the frame that the model speaks
    (pixels of the resized image, or thousandths) give the same IoU as boxes in the original image's pixels:
    nothing needs converting.
    """
    intersection, union = _areas(a, b)
    return intersection / torch.where(union > 0, union, 1)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU [...] in [-1, 1] of xyxy boxes [..., 4]: IoU less the share of the smallest box around
    both that neither covers; never NaN."""
    intersection, union = _areas(a, b)
    hull = (
        (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    )
    return intersection / torch.where(union > 0, union, 1) - (hull - union).clamp(min=0) / torch.where(
        hull > 0, hull, 1
    )
