"""The box reader and its reward in plain PyTorch: the oracle of the kernel, and the path that runs where
there is none.

Legend: R reply rows, L tokens a row, W `table.width`, N = L * W character positions, V vocabulary rows, G
rows a group. Boxes are xyxy float32.
Nothing here copies a value to the host, so nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locus_kernels.box_reward.automaton import (
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
)
from locus_kernels.box_reward.overlaps import iou
from locus_kernels.box_reward.records import BoxReading, BoxReward, Scoring
from locus_kernels.box_reward.shapes import REWARD_SHAPES
from locus_kernels.box_reward.table import TokenTable

WHICH = ("first", "last", "answer")
GRAMMARS = {"think_answer": THINK_ANSWER, "direct": DIRECT}
FRACTION_DIGITS = 6
UNIT = 10**FRACTION_DIGITS  # numbers are read as whole millionths
LARGEST = 1_000_000 * UNIT  # the largest magnitude that a coordinate may have


# --------------------------------------------------------------------------------------------------- reading
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


def read_boxes(ids: Tensor, lengths: Tensor, table: TokenTable, *, which: str, grammar: str) -> BoxReading:
    """What `op.read_boxes` documents. A tensor of N * R actions is kept, and its reading is a few operations
    on all of it at once."""
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


# ---------------------------------------------------------------------------------------------------- reward
def check_groups(rows: int, group_size: int) -> None:
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
    check_groups(reward.shape[0], group_size)
    groups = reward.reshape(reward.shape[0] // group_size, group_size)
    zero_variance = groups.amax(1) == groups.amin(1)
    centred = groups - groups.mean(1, keepdim=True)
    if normalize_std:
        centred = centred / ((centred.square().sum(1, keepdim=True) / max(group_size - 1, 1)).sqrt() + eps)
    return torch.where(zero_variance[:, None], 0.0, centred).flatten(), zero_variance


def box_reward(
    ids: Tensor,
    lengths: Tensor,
    table: TokenTable,
    target_boxes: Tensor,
    scoring: Scoring,
    *,
    which: str,
    grammar: str,
) -> BoxReward:
    """What `op.box_reward` documents, from the pieces above."""
    group_size, shape, format_weight, normalize_std, progress = scoring
    reading = read_boxes(ids, lengths, table, which=which, grammar=grammar)
    overlap = torch.where(reading.valid, iou(reading.box, target_boxes), 0.0)
    earned = REWARD_SHAPES[shape](reading.box, target_boxes, progress)
    shaped = torch.where(reading.valid, earned, 0.0)
    reward = (1 - format_weight) * shaped + format_weight * reading.format_ok.float()
    advantage, zero_variance = group_advantage(reward, group_size, normalize_std)
    return BoxReward(*reading, overlap, reward, advantage, zero_variance)
