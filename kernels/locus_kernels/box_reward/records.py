"""What goes into the box reward besides tensors, and what comes out. Legend: R rows, G rows a group."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scoring(NamedTuple):
    """How a reading becomes a reward and an advantage, see `op.box_reward`."""

    group_size: int  # G
    shape: str  # a name in `REWARD_SHAPES`
    format_weight: float  # in [0, 1]
    normalize_std: bool
    progress: float  # share of training done, in [0, 1]


class BoxReading(NamedTuple):
    """What R replies say."""

    # float32 [R, 4], xyxy in the frame that the model speaks; zeros where no box was found or a number is too
    # large
    box: Tensor
    valid: Tensor  # bool [R]: a box was found, its numbers are in range, and x2 > x1 and y2 > y1
    format_ok: Tensor  # bool [R]: the whole reply follows the grammar


class BoxReward(NamedTuple):
    """What R replies earn. The first three fields are those of `BoxReading`."""

    box: Tensor
    valid: Tensor
    format_ok: Tensor
    iou: Tensor  # float32 [R]: plain IoU with the target; 0 where the box is not valid
    reward: Tensor  # float32 [R]
    advantage: Tensor  # float32 [R]
    zero_variance: Tensor  # bool [R / G]: all rewards of the group are equal, and its advantages exactly 0
