"""The box reader, its reward and the group advantage as one Triton kernel: one launch, one read of the ids,
nothing read back.

A program holds GROUPS whole groups of BLOCK >= G lanes, one lane a reply. Numbers are exact integers
(millionths), as in the reference, and divisions and roots round to nearest, so that the kernel's readings are
the reference's bit for bit. The lanes' walk over the tokens is in `triton_reading.py`, the reward shapes are
in `triton_shapes.py`.

Legend: G rows a group; lanes are [GROUPS, BLOCK].
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from locus_kernels.box_reward import automaton
from locus_kernels.box_reward.records import BoxReading, BoxReward, Scoring
from locus_kernels.box_reward.reference import GRAMMARS, LARGEST, UNIT, WHICH
from locus_kernels.box_reward.table import TokenTable
from locus_kernels.box_reward.triton_reading import walk
from locus_kernels.box_reward.triton_shapes import SHAPES, overlaps

ANSWER, ANSWER_CLOSED = tl.constexpr(WHICH.index("answer")), tl.constexpr(automaton.ANSWER_CLOSED)
MILLION, MOST = tl.constexpr(UNIT), tl.constexpr(LARGEST)
MAX_GROUP = 512  # replies that one program can hold
READING = Scoring(1, "iou", 0.0, False, 0.0)  # rows by themselves; no reward is computed


# ----------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _coordinate(number, found):
    """Millionths as float32, rounded once; 0 where no box was found."""
    return tl.where(found, (number.to(tl.float64) / MILLION).to(tl.float32), 0.0)


@triton.jit
def _advantages(reward, lane, group_size, NORMALIZE: tl.constexpr):
    """(advantage [GROUPS, BLOCK], whether all rewards of the group are equal [GROUPS]), as
    `reference.group_advantage`."""
    equal = tl.max(tl.where(lane, reward, float("-inf")), 1) == tl.min(
        tl.where(lane, reward, float("inf")), 1
    )
    size = tl.full(equal.shape, 0.0, tl.float32) + group_size
    mean = tl.div_rn(tl.sum(tl.where(lane, reward, 0.0), 1), size)
    centred = tl.where(lane, reward - mean[:, None], 0.0)
    if NORMALIZE:
        variance = tl.div_rn(tl.sum(centred * centred, 1), tl.maximum(size - 1.0, 1.0))
        deviation = tl.sqrt_rn(variance) + 1e-6
        centred = tl.div_rn(centred, deviation[:, None] + tl.zeros_like(centred))
    return tl.where(equal[:, None], 0.0, centred), equal


@triton.jit(do_not_specialize=["tokens", "rows"])
def box_reward_kernel(
    ids, lengths, offsets, classes, transitions, final, target,  # inputs
    box, valid, format_ok, iou, reward, advantage, zero_variance,  # outputs
    rows, tokens, vocab_size, group_size, stride_r, stride_l, stride_length,
    shape_weight, format_weight, rising,
    SHAPE: tl.constexpr, READ: tl.constexpr, FORMAT: tl.constexpr,
    REWARD: tl.constexpr, NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Program p rewards GROUPS groups from p * GROUPS on. Without REWARD it only reads; `target` and the last
    four outputs stay untouched."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    member = tl.arange(0, BLOCK)
    row = group[:, None] * group_size + member[None, :]
    lane = (member[None, :] < group_size) & (row < rows)
    length = tl.load(lengths + row * stride_length, mask=lane, other=0).to(tl.int64)
    length = tl.minimum(tl.maximum(length, 0), tokens).to(tl.int32)
    step = tl.full((1, 1), 0, tl.int64) + stride_l

    machine = walk(
        ids + row * stride_r, step, length, offsets, classes, transitions, vocab_size,
        READ, GROUPS, BLOCK, UNROLL,
    )  # fmt: skip
    state, x1, y1, x2, y2, found = machine[0], machine[8], machine[9], machine[10], machine[11], machine[12]
    flags = tl.load(final + state).to(tl.int32)
    formed = (flags & FORMAT) != 0
    if READ == ANSWER:
        found = found & ((flags & ANSWER_CLOSED) != 0)
    largest = tl.maximum(tl.maximum(tl.abs(x1), tl.abs(y1)), tl.maximum(tl.abs(x2), tl.abs(y2)))
    found = found & (largest <= MOST)
    x1, y1 = _coordinate(x1, found), _coordinate(y1, found)
    x2, y2 = _coordinate(x2, found), _coordinate(y2, found)
    good = (x2 > x1) & (y2 > y1)
    tl.store(box + row * 4, x1, mask=lane)
    tl.store(box + row * 4 + 1, y1, mask=lane)
    tl.store(box + row * 4 + 2, x2, mask=lane)
    tl.store(box + row * 4 + 3, y2, mask=lane)
    tl.store(valid + row, good.to(tl.uint8), mask=lane)
    tl.store(format_ok + row, formed.to(tl.uint8), mask=lane)
    if REWARD:
        overlap, generalised = overlaps(x1, y1, x2, y2, target + row * 4, lane)
        shaped = tl.where(good, SHAPE(overlap, generalised, rising), 0.0)
        earned = shape_weight * shaped + format_weight * formed.to(tl.float32)
        relative, equal = _advantages(earned, lane, group_size, NORMALIZE)
        tl.store(iou + row, tl.where(good, overlap, 0.0), mask=lane)
        tl.store(reward + row, earned, mask=lane)
        tl.store(advantage + row, relative, mask=lane)
        tl.store(zero_variance + group, equal.to(tl.uint8), mask=group * group_size < rows)


# --------------------------------------------------------------------------------------------------- launcher
def _check_layout(table: TokenTable, group_size: int) -> None:
    expected = {
        "offsets": torch.int32,
        "classes": torch.uint8,
        "transitions": torch.int16,
        "final": torch.uint8,
    }
    for name, dtype in expected.items():
        tensor = getattr(table, name)
        if tensor.dtype != dtype or tensor.ndim != 1 or not tensor.is_contiguous():
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"table.{name}: expected a contiguous {dtype} vector, got {got}")
    if not 1 <= group_size <= MAX_GROUP:
        limit = f"the kernel holds a group in one program, expected 1 .. {MAX_GROUP}"
        raise ValueError(f"group_size: {limit}, got {group_size}")


def _outputs(rows: int, groups: int, reward: bool, device: torch.device) -> list[Tensor]:
    """The tensors of BoxReward, the last four empty without a reward."""
    flag, number = torch.bool, torch.float32
    shapes = [(rows, 4), (rows,), (rows,), *([(rows,)] * 3 + [(groups,)] if reward else [(0,)] * 4)]
    dtypes = [number, flag, flag, number, number, number, flag]
    return [torch.empty(s, dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=True)]


def _launch(
    ids: Tensor,
    lengths: Tensor,
    table: TokenTable,
    target: Tensor | None,
    scoring: Scoring,
    options: dict[str, Any],
    lanes: int,
) -> list[Tensor]:
    """Allocate the outputs and launch once. Without a target only the reading counts. `lanes` a program,
    about."""
    _check_layout(table, scoring.group_size)
    rows, tokens = ids.shape
    groups = rows // scoring.group_size
    out = _outputs(rows, groups, target is not None, ids.device)
    if rows:
        block = triton.next_power_of_2(scoring.group_size)
        side_by_side = max(1, lanes // block)
        raw = [o.view(torch.uint8) if o.dtype == torch.bool else o for o in out]
        machine = (table.offsets, table.classes, table.transitions, table.final)
        box_reward_kernel[(triton.cdiv(groups, side_by_side),)](
            ids, lengths, *machine, out[0] if target is None else target, *raw,
            rows, tokens, table.vocab_size, scoring.group_size,
            ids.stride(0), ids.stride(1), lengths.stride(0),
            1 - scoring.format_weight, scoring.format_weight, 0.25 + 0.5 * scoring.progress,
            SHAPE=SHAPES[scoring.shape], NORMALIZE=scoring.normalize_std, REWARD=target is not None,
            **options, GROUPS=side_by_side, BLOCK=block, UNROLL=8,
            num_warps=max(1, min(16, side_by_side * block // 32)), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def read_boxes(
    ids: Tensor, lengths: Tensor, table: TokenTable, *, which: str, grammar: str, lanes: int = 32
) -> BoxReading:
    """`reference.read_boxes` in one launch; arguments as there, checked by the caller."""
    options = {"READ": WHICH.index(which), "FORMAT": GRAMMARS[grammar]}
    return BoxReading(*_launch(ids, lengths, table, None, READING, options, lanes)[:3])


def box_reward(
    ids: Tensor,
    lengths: Tensor,
    table: TokenTable,
    target_boxes: Tensor,
    scoring: Scoring,
    *,
    which: str,
    grammar: str,
    lanes: int = 32,
) -> BoxReward:
    """`reference.box_reward` in one launch; arguments as there, checked by the caller. ValueError for a group
    of more than MAX_GROUP."""
    options = {"READ": WHICH.index(which), "FORMAT": GRAMMARS[grammar]}
    return BoxReward(*_launch(ids, lengths, table, target_boxes.contiguous(), scoring, options, lanes))
