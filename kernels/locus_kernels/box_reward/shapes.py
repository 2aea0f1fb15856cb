"""The shapes of a reward: from a box and its target to a number.

A shape has its name, its function here and its function in `triton_shapes.py` from one line of
`REWARD_SHAPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from locus_kernels.box_reward.overlaps import giou, iou


@dataclass(frozen=True)
class RewardShape:
    """shape(predicted, target, progress) -> float32 [R]: predicted and target boxes, float32 [R, 4], and the
    progress of training in [0, 1]; 0 for a degenerate box."""

    function: Callable[[Tensor, Tensor, float], Tensor]
    kernel: str  # name of its function in `triton_shapes.py`

    def __call__(self, predicted: Tensor, target: Tensor, progress: float) -> Tensor:
        return self.function(predicted, target, progress)


def _iou(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """Plain IoU."""
    return iou(predicted, target)


def _iou_squared(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """IoU squared: pays more for the last bit of precision."""
    return iou(predicted, target).square()


def _iou_over_half(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """IoU above 0.5, else 0."""
    overlap = iou(predicted, target)
    return torch.where(overlap > 0.5, overlap, 0.0)


def _has_area(box: Tensor) -> Tensor:
    return (box[..., 2:] > box[..., :2]).all(-1)


def _giou(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """GIoU, in [-1, 1]. Note that a valid box far from the target earns less than no box, which earns 0."""
    return torch.where(_has_area(predicted), giou(predicted, target), 0.0)


def _giou_plus_one(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """GIoU + 1, in [0, 2]: a far box earns little, but never less than no box."""
    return torch.where(_has_area(predicted), giou(predicted, target) + 1, 0.0)


def _threshold(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """1 from IoU 0.5 on, else 0."""
    return (iou(predicted, target) >= 0.5).float()


def _ramp(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """0 up to IoU 0.5, 1 from 0.75 on, a straight line between."""
    return ((iou(predicted, target) - 0.5) / 0.25).clamp(0, 1)


def _rising(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """1 from a threshold on, else 0; the threshold rises in a straight line from IoU 0.25 at progress 0 to
    0.75 at progress 1."""
    return (iou(predicted, target) >= 0.25 + 0.5 * progress).float()


REWARD_SHAPES: dict[str, RewardShape] = {
    "iou": RewardShape(_iou, "shape_iou"),
    "iou_squared": RewardShape(_iou_squared, "shape_iou_squared"),
    "iou_over_half": RewardShape(_iou_over_half, "shape_iou_over_half"),
    "giou": RewardShape(_giou, "shape_giou"),
    "giou_plus_one": RewardShape(_giou_plus_one, "shape_giou_plus_one"),
    "threshold": RewardShape(_threshold, "shape_threshold"),
    "ramp": RewardShape(_ramp, "shape_ramp"),
    "rising": RewardShape(_rising, "shape_rising"),
}
