"""The box reader and its reward in plain PyTorch: the oracle of the kernel, and the path that runs where
there is none.

Legend: R reply rows, L tokens a row, W `table.width`, N = L * W character positions, V vocabulary rows, G
rows a group. Boxes are xyxy float32. Nothing here copies a value to the host (except with `validate=True`),
so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from locus_kernels.box_reward.table import (
    ACTION_SHIFT,
    ANSWER_CLOSED,
    CLASS_COUNT,
    CLOSE,
    CLOSE_IN_ANSWER,
    DIGIT,
    DIRECT,
    FRACTION,
    MINUS,
    NEXT,
    OPEN,
    OTHER,
    PADDING,
    STATE_MASK,
    THINK_ANSWER,
    TokenTable,
)

WHICH = ("first", "last", "answer")
GRAMMARS = {"think_answer": THINK_ANSWER, "direct": DIRECT}
FRACTION_DIGITS = 6
UNIT = 10**FRACTION_DIGITS  # numbers are read as whole millionths
LARGEST = 1_000_000 * UNIT  # the largest magnitude that a coordinate may have


class BoxReading(NamedTuple):
    """What R replies say."""

    box: Tensor  # float32 [R, 4], xyxy in the frame that the model speaks; zeros where no box was found or a number is too large
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


# ---------------------------------------------------------------------------------------------------- reading
def _expand(ids: Tensor, lengths: Tensor, table: TokenTable) -> Tensor:
    """Classes int64 [N, R] of every character position, time first; PADDING past a token's end and past the
    row's length."""
    token_LR = ids.t().long()
    counted_LR = torch.arange(ids.shape[1], device=ids.device)[:, None] < lengths
    known_LR = (token_LR >= 0) & (token_LR < table.vocab_size)
    token_LR = torch.where(known_LR & counted_LR, token_LR, 0)
    begin_LR = table.offsets[token_LR].long()
    count_LR = torch.where(known_LR, table.offsets[token_LR + 1] - begin_LR, 1) * counted_LR
    column_W = torch.arange(table.width, device=ids.device)[:, None]
    place_LWR = (begin_LR[:, None] + column_W).clamp(max=table.classes.shape[0] - 1)
    symbol_LWR = torch.where(known_LR[:, None], table.classes[place_LWR], OTHER)
    return torch.where(column_W < count_LR[:, None], symbol_LWR, PADDING).flatten(0, 1).long()


def _run(symbol_NR: Tensor, table: TokenTable) -> tuple[Tensor, Tensor]:
    """Run the automaton over all rows at once: (action int16 [N, R] of every character, final state int64
    [R])."""
    next_row = (
        table.transitions & STATE_MASK
    ).long() * CLASS_COUNT  # where the next state's row of the table begins
    row_R = torch.zeros_like(symbol_NR[0])
    index_NR = torch.empty_like(symbol_NR)
    for symbol_R, index_R in zip(symbol_NR.unbind(0), index_NR.unbind(0), strict=True):
        torch.add(row_R, symbol_R, out=index_R)
        row_R = next_row.index_select(0, index_R)
    return (table.transitions >> ACTION_SHIFT)[index_NR], row_R // CLASS_COUNT


def _span(action_NR: Tensor, which: str) -> tuple[Tensor, Tensor]:
    """Positions int64 [R] of the `[` and the `]` of the chosen box; the `]` is -1 where there is none."""
    positions = action_NR.shape[0]
    position_N1 = torch.arange(positions, device=action_NR.device)[:, None]
    closes_NR = action_NR == CLOSE_IN_ANSWER if which == "answer" else action_NR >= CLOSE
    if which == "last":
        end_R = torch.where(closes_NR, position_N1, -1).amax(0)
    else:
        end_R = torch.where(closes_NR, position_N1, positions).amin(0)
        end_R = torch.where(end_R < positions, end_R, -1)
    begin_R = torch.where((action_NR == OPEN) & (position_N1 < end_R), position_N1, -1).amax(0)
    return begin_R, end_R


def _numbers(action_NR: Tensor, symbol_NR: Tensor, begin_R: Tensor, end_R: Tensor) -> Tensor:
    """The four numbers between `begin` and `end` as millionths, int64 [R, 4]; beyond +-LARGEST where the
    number said is.

    A digit's weight follows from how many digits stand to its right (before the point) or left (after it),
    within its own number. Digits further left than a million weigh ten millions, which is enough to be out of
    range; digits after the sixth behind the point weigh nothing.
    """
    position_N1 = torch.arange(action_NR.shape[0], device=action_NR.device)[:, None]
    action_NR = torch.where((position_N1 > begin_R) & (position_N1 < end_R), action_NR, 0)
    number_NR = (action_NR == NEXT).cumsum(0, dtype=torch.int32)
    numbers = []
    for k in range(4):
        mine_NR = torch.where(number_NR == k, action_NR, 0)
        whole_NR, fraction_NR = mine_NR == DIGIT, mine_NR == FRACTION
        seen_NR = whole_NR.cumsum(0, dtype=torch.int32)
        weight_NR = whole_NR * 10 ** (seen_NR[-1] - seen_NR).clamp(max=7)
        whole_R = (weight_NR * symbol_NR).sum(0).clamp(max=2 * LARGEST // UNIT)
        seen_NR = fraction_NR.cumsum(0, dtype=torch.int32)
        weight_NR = (fraction_NR & (seen_NR <= FRACTION_DIGITS)) * 10 ** (FRACTION_DIGITS - seen_NR).clamp(
            min=0
        )
        magnitude_R = whole_R * UNIT + (weight_NR * symbol_NR).sum(0)
        numbers.append(torch.where((mine_NR == MINUS).any(0), -magnitude_R, magnitude_R))
    return torch.stack(numbers, -1)


def _check_values(ids: Tensor, lengths: Tensor, table: TokenTable) -> None:
    if bool(((lengths < 0) | (lengths > ids.shape[1])).any()):
        raise ValueError(f"lengths: expected values in [0, {ids.shape[1]}], got {lengths.tolist()}")
    counted = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    wrong = counted & ((ids < 0) | (ids >= table.vocab_size))
    if bool(wrong.any()):
        raise ValueError(
            f"ids: expected values in [0, {table.vocab_size}), got {ids[wrong].unique().tolist()}"
        )


def check_reading(
    ids: Tensor,
    lengths: Tensor,
    table: TokenTable,
    which: str,
    grammar: str,
    vocab_size: int | None,
    validate: bool,
) -> None:
    """Raise the ValueErrors of `read_boxes`."""
    for name, tensor in (("ids", ids), ("lengths", lengths)):
        if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(f"{name}: expected an integer tensor, got {tensor.dtype}")
        if tensor.device != table.offsets.device:
            raise ValueError(
                f"{name}: expected the token table's device {table.offsets.device}, got {tensor.device}"
            )
    if ids.ndim != 2 or lengths.shape != ids.shape[:1]:
        raise ValueError(
            f"expected ids [rows, tokens] and lengths [rows], got {list(ids.shape)} and {list(lengths.shape)}"
        )
    if which not in WHICH:
        raise ValueError(f"which: expected one of {list(WHICH)}, got {which!r}")
    if grammar not in GRAMMARS:
        raise ValueError(f"grammar: expected one of {list(GRAMMARS)}, got {grammar!r}")
    if vocab_size is not None and vocab_size != table.vocab_size:
        raise ValueError(
            f"table: expected one for a vocabulary of {vocab_size} ids, got one for {table.vocab_size}: build it with that vocab_size"
        )
    if validate:
        _check_values(ids.long(), lengths.long(), table)


def read_boxes(
    ids: Tensor,
    lengths: Tensor,
    table: TokenTable,
    *,
    which: str = "answer",
    grammar: str = "think_answer",
    validate: bool = False,
) -> BoxReading:
    """What `op.read_boxes` documents. A tensor of N * R actions is kept, and its reading is a few operations
    on all of it at once."""
    check_reading(ids, lengths, table, which, grammar, None, validate)
    lengths = lengths.long()  # unsigned types compare with nothing
    if ids.shape[1] == 0:
        ids, lengths = ids.new_zeros(ids.shape[0], 1), torch.zeros_like(lengths)
    symbol_NR = _expand(ids, lengths, table)
    action_NR, state_R = _run(symbol_NR, table)
    begin_R, end_R = _span(action_NR, which)
    number_R4 = _numbers(action_NR, symbol_NR, begin_R, end_R)
    flags_R = table.final[state_R]
    found_R = (end_R >= 0) & (number_R4.abs() <= LARGEST).all(-1)
    if which == "answer":
        found_R = found_R & ((flags_R & ANSWER_CLOSED) != 0)
    box_R4 = torch.where(found_R[:, None], number_R4.double() / UNIT, 0.0).float()
    valid_R = (box_R4[:, 2] > box_R4[:, 0]) & (box_R4[:, 3] > box_R4[:, 1])
    return BoxReading(box_R4, valid_R, (flags_R & GRAMMARS[grammar]) != 0)


# --------------------------------------------------------------------------------------------------- overlaps
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


# ----------------------------------------------------------------------------------------------------- shapes
# Each takes predicted and target boxes, float32 [R, 4], and the progress of training in [0, 1], and returns float32 [R]; 0 for a degenerate box.
RewardShape = Callable[[Tensor, Tensor, float], Tensor]


def shape_iou(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """Plain IoU."""
    return iou(predicted, target)


def shape_iou_squared(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """IoU squared: pays more for the last bit of precision."""
    return iou(predicted, target).square()


def shape_iou_over_half(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """IoU above 0.5, else 0."""
    overlap = iou(predicted, target)
    return torch.where(overlap > 0.5, overlap, 0.0)


def _has_area(box: Tensor) -> Tensor:
    return (box[..., 2:] > box[..., :2]).all(-1)


def shape_giou(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """GIoU, in [-1, 1]. Note that a valid box far from the target earns less than no box, which earns 0."""
    return torch.where(_has_area(predicted), giou(predicted, target), 0.0)


def shape_giou_plus_one(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """GIoU + 1, in [0, 2]: a far box earns little, but never less than no box."""
    return torch.where(_has_area(predicted), giou(predicted, target) + 1, 0.0)


def shape_threshold(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """1 from IoU 0.5 on, else 0."""
    return (iou(predicted, target) >= 0.5).float()


def shape_ramp(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """0 up to IoU 0.5, 1 from 0.75 on, a straight line between."""
    return ((iou(predicted, target) - 0.5) / 0.25).clamp(0, 1)


def shape_rising(predicted: Tensor, target: Tensor, progress: float) -> Tensor:
    """1 from a threshold on, else 0; the threshold rises in a straight line from IoU 0.25 at progress 0 to
    0.75 at progress 1."""
    return (iou(predicted, target) >= 0.25 + 0.5 * progress).float()


REWARD_SHAPES: dict[str, RewardShape] = {
    "iou": shape_iou,
    "iou_squared": shape_iou_squared,
    "iou_over_half": shape_iou_over_half,
    "giou": shape_giou,
    "giou_plus_one": shape_giou_plus_one,
    "threshold": shape_threshold,
    "ramp": shape_ramp,
    "rising": shape_rising,
}


# ----------------------------------------------------------------------------------------------------- reward
def _check_groups(rows: int, group_size: int) -> None:
    if not isinstance(group_size, int) or group_size < 1 or rows % group_size:
        raise ValueError(f"group_size: expected a positive divisor of the {rows} rows, got {group_size}")


def group_advantage(
    reward: Tensor, group_size: int, normalize_std: bool = True, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Advantage float32 [R] of each reward [R] within its group of `group_size` neighbouring rows, and bool
    [R / G] where a group has no variance.

    (reward - mean) / (std + eps) with the unbiased standard deviation, or reward - mean alone. Exactly 0
    where a group's rewards are all equal, which a group of one always is. Raises ValueError unless reward is
    float32 [R] and group_size divides R.
    """
    if reward.ndim != 1 or reward.dtype != torch.float32:
        raise ValueError(f"reward: expected float32 [rows], got {reward.dtype} {list(reward.shape)}")
    _check_groups(reward.shape[0], group_size)
    groups = reward.reshape(reward.shape[0] // group_size, group_size)
    zero_variance = groups.amax(1) == groups.amin(1)
    centred = groups - groups.mean(1, keepdim=True)
    if normalize_std:
        centred = centred / ((centred.square().sum(1, keepdim=True) / max(group_size - 1, 1)).sqrt() + eps)
    return torch.where(zero_variance[:, None], 0.0, centred).flatten(), zero_variance


def check_reward(
    ids: Tensor, target_boxes: Tensor, group_size: int, shape: str, format_weight: float, progress: float
) -> None:
    """Raise the ValueErrors of `box_reward` that are not those of `read_boxes`."""
    if shape not in REWARD_SHAPES:
        raise ValueError(f"shape: expected one of {list(REWARD_SHAPES)}, got {shape!r}")
    if not 0 <= format_weight <= 1 or not 0 <= progress <= 1:
        raise ValueError(f"expected format_weight and progress in [0, 1], got {format_weight} and {progress}")
    if target_boxes.dtype != torch.float32 or target_boxes.shape != (*ids.shape[:1], 4):
        raise ValueError(
            f"target_boxes: expected float32 {[*ids.shape[:1], 4]}, got {target_boxes.dtype} {list(target_boxes.shape)}"
        )
    if target_boxes.device != ids.device:
        raise ValueError(f"target_boxes: expected the device of ids, {ids.device}, got {target_boxes.device}")
    _check_groups(ids.shape[0], group_size)


def box_reward(
    ids: Tensor,
    lengths: Tensor,
    table: TokenTable,
    target_boxes: Tensor,
    group_size: int,
    *,
    which: str = "answer",
    grammar: str = "think_answer",
    shape: str = "iou",
    format_weight: float = 0.1,
    normalize_std: bool = True,
    progress: float = 0.0,
    validate: bool = False,
) -> BoxReward:
    """What `op.box_reward` documents, from the pieces above."""
    check_reward(ids, target_boxes, group_size, shape, format_weight, progress)
    reading = read_boxes(ids, lengths, table, which=which, grammar=grammar, validate=validate)
    overlap = torch.where(reading.valid, iou(reading.box, target_boxes), 0.0)
    shaped = torch.where(reading.valid, REWARD_SHAPES[shape](reading.box, target_boxes, progress), 0.0)
    reward = (1 - format_weight) * shaped + format_weight * reading.format_ok.float()
    advantage, zero_variance = group_advantage(reward, group_size, normalize_std)
    return BoxReward(*reading, overlap, reward, advantage, zero_variance)
