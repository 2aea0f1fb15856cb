"""The box reader, its reward and the group advantage as one Triton kernel: one launch, one read of the ids,
nothing read back.

A program holds GROUPS whole groups of BLOCK >= G lanes, one lane a reply, and walks over the tokens. Only the
automaton's state is a chain of dependent loads (one table look-up a character, from a table of 28 KB that
stays in the first cache), so everything else is fetched ahead of it: ids, offsets and first classes of the
next UNROLL tokens are loaded before the present ones are read. Numbers are exact integers (millionths), as in
the reference, and divisions and roots round to nearest, so that the kernel's readings are the reference's bit
for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from locus_kernels.box_reward import table as t
from locus_kernels.box_reward.reference import GRAMMARS, LARGEST, UNIT, WHICH, BoxReading, BoxReward
from locus_kernels.box_reward.table import TokenTable

SHIFT, MASK, CLASSES = tl.constexpr(t.ACTION_SHIFT), tl.constexpr(t.STATE_MASK), tl.constexpr(t.CLASS_COUNT)
OTHER, PADDING, ANSWER_CLOSED = tl.constexpr(t.OTHER), tl.constexpr(t.PADDING), tl.constexpr(t.ANSWER_CLOSED)
OPEN, MINUS, DIGIT, FRACTION, NEXT = (tl.constexpr(a) for a in (t.OPEN, t.MINUS, t.DIGIT, t.FRACTION, t.NEXT))
CLOSE, CLOSE_IN_ANSWER = tl.constexpr(t.CLOSE), tl.constexpr(t.CLOSE_IN_ANSWER)
FIRST, LAST, ANSWER = (tl.constexpr(WHICH.index(name)) for name in ("first", "last", "answer"))
MILLION, MOST, TOO_MUCH = tl.constexpr(UNIT), tl.constexpr(LARGEST), tl.constexpr(2 * LARGEST // UNIT)
MAX_GROUP = 512  # replies that one program can hold


# ----------------------------------------------------------------------------------------------------- shapes
# One small function per reward shape: (IoU, GIoU, rising threshold) -> reward of a valid box. `rising` is 0.25 + 0.5 * progress.
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


SHAPES = {
    "iou": shape_iou,
    "iou_squared": shape_iou_squared,
    "iou_over_half": shape_iou_over_half,
    "giou": shape_giou,
    "giou_plus_one": shape_giou_plus_one,
    "threshold": shape_threshold,
    "ramp": shape_ramp,
    "rising": shape_rising,
}


# ----------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _fetch(ids, step, at, length, offsets, classes, vocab_size, UNROLL: tl.constexpr):
    """What tokens at .. at + UNROLL of every lane begin with: (where its classes begin, how many they are,
    the first), UNROLL of each."""
    begins, counts, heads = (), (), ()
    for u in tl.static_range(UNROLL):
        counted = at + u < length
        token = tl.load(ids + (at + u) * step, mask=counted, other=0).to(tl.int64)
        known = counted & (token >= 0) & (token < vocab_size)
        token = tl.where(known, token, 0)
        begin = tl.load(offsets + token, mask=known, other=0)
        count = tl.load(offsets + token + 1, mask=known, other=0) - begin
        symbol = tl.load(classes + begin, mask=count > 0, other=PADDING).to(tl.int32)
        unknown = counted & (known == 0)
        symbol, count = tl.where(unknown, OTHER, symbol), tl.where(unknown, 1, count)
        begins, counts, heads = begins + (begin,), counts + (count,), heads + (symbol,)  # type: ignore[assignment]  # noqa: RUF005
    return begins, counts, heads


@triton.jit
def _start(GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """The machine before the first class, a value a lane: state; the number being read (whole part,
    millionths, weight of the next fraction digit, sign); the last three numbers of the box being read; the
    chosen box in millionths; whether there is one."""
    none = tl.zeros((GROUPS, BLOCK), tl.int32)
    zero = tl.zeros((GROUPS, BLOCK), tl.int64)
    no = none > 0
    return none, none, none, none + MILLION // 10, no, zero, zero, zero, zero, zero, zero, zero, no


@triton.jit
def _step(symbol, machine, transitions, READ: tl.constexpr):
    """One class of every lane: the machine's next values."""
    state, whole, fraction, weight, minus, first, second, third, x1, y1, x2, y2, chosen = machine
    entry = tl.load(transitions + state * CLASSES + symbol).to(tl.int32)
    state, action = entry & MASK, entry >> SHIFT
    whole = tl.where(action == DIGIT, tl.minimum(whole * 10 + symbol, TOO_MUCH), whole)
    fraction = tl.where(action == FRACTION, fraction + weight * symbol, fraction)
    weight = tl.where(action == FRACTION, weight // 10, weight)
    minus = minus | (action == MINUS)
    magnitude = whole.to(tl.int64) * MILLION + fraction
    number = tl.where(minus, -magnitude, magnitude)
    closes = action >= CLOSE
    if READ == ANSWER:
        closes = action == CLOSE_IN_ANSWER
    take = closes
    if READ != LAST:
        take = closes & (chosen == 0)
    x1, y1 = tl.where(take, first, x1), tl.where(take, second, y1)
    x2, y2 = tl.where(take, third, x2), tl.where(take, number, y2)
    chosen = chosen | closes
    following = action == NEXT
    first = tl.where(following, second, first)
    second = tl.where(following, third, second)
    third = tl.where(following, number, third)
    fresh = following | (action == OPEN)
    whole, fraction = tl.where(fresh, 0, whole), tl.where(fresh, 0, fraction)
    weight, minus = tl.where(fresh, MILLION // 10, weight), minus & (fresh == 0)
    return state, whole, fraction, weight, minus, first, second, third, x1, y1, x2, y2, chosen


@triton.jit
def _coordinate(number, found):
    """Millionths as float32, rounded once; 0 where no box was found."""
    return tl.where(found, (number.to(tl.float64) / MILLION).to(tl.float32), 0.0)


@triton.jit
def _area(x1, y1, x2, y2):
    return tl.maximum(x2 - x1, 0.0) * tl.maximum(y2 - y1, 0.0)


@triton.jit
def _overlaps(x1, y1, x2, y2, target, lane):
    """(IoU, GIoU) of the boxes with their targets, as `reference.iou` and `reference.giou`."""
    tx1, ty1 = tl.load(target, mask=lane, other=0.0), tl.load(target + 1, mask=lane, other=0.0)
    tx2, ty2 = tl.load(target + 2, mask=lane, other=0.0), tl.load(target + 3, mask=lane, other=0.0)
    inner = _area(tl.maximum(x1, tx1), tl.maximum(y1, ty1), tl.minimum(x2, tx2), tl.minimum(y2, ty2))
    union = _area(x1, y1, x2, y2) + _area(tx1, ty1, tx2, ty2) - inner
    hull = _area(tl.minimum(x1, tx1), tl.minimum(y1, ty1), tl.maximum(x2, tx2), tl.maximum(y2, ty2))
    iou = tl.div_rn(inner, tl.where(union > 0, union, 1.0))
    return iou, iou - tl.div_rn(tl.maximum(hull - union, 0.0), tl.where(hull > 0, hull, 1.0))


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
    SHAPE: tl.constexpr, READ: tl.constexpr, FORMAT: tl.constexpr, REWARD: tl.constexpr, NORMALIZE: tl.constexpr,
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

    machine = _start(GROUPS, BLOCK)
    begins, counts, heads = _fetch(
        ids + row * stride_r, step, 0, length, offsets, classes, vocab_size, UNROLL
    )
    for at in range(0, tl.max(length), UNROLL):
        later = _fetch(ids + row * stride_r, step, at + UNROLL, length, offsets, classes, vocab_size, UNROLL)
        for u in tl.static_range(UNROLL):
            symbol = heads[u]
            for c in range(1, tl.max(counts[u]) + 1):
                following = tl.load(classes + begins[u] + c, mask=c < counts[u], other=PADDING).to(tl.int32)
                machine = _step(symbol, machine, transitions, READ)
                symbol = following
        begins, counts, heads = later
    state, x1, y1, x2, y2, found = machine[0], machine[8], machine[9], machine[10], machine[11], machine[12]
    flags = tl.load(final + state).to(tl.int32)
    formed = (flags & FORMAT) != 0
    if READ == ANSWER:
        found = found & ((flags & ANSWER_CLOSED) != 0)
    found = found & (
        tl.maximum(tl.maximum(tl.abs(x1), tl.abs(y1)), tl.maximum(tl.abs(x2), tl.abs(y2))) <= MOST
    )
    x1, y1, x2, y2 = (
        _coordinate(x1, found),
        _coordinate(y1, found),
        _coordinate(x2, found),
        _coordinate(y2, found),
    )
    good = (x2 > x1) & (y2 > y1)
    tl.store(box + row * 4, x1, mask=lane)
    tl.store(box + row * 4 + 1, y1, mask=lane)
    tl.store(box + row * 4 + 2, x2, mask=lane)
    tl.store(box + row * 4 + 3, y2, mask=lane)
    tl.store(valid + row, good.to(tl.uint8), mask=lane)
    tl.store(format_ok + row, formed.to(tl.uint8), mask=lane)
    if REWARD:
        overlap, generalised = _overlaps(x1, y1, x2, y2, target + row * 4, lane)
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
            raise ValueError(
                f"table.{name}: expected a contiguous {dtype} vector, got {tensor.dtype} {list(tensor.shape)}"
            )
    if not 1 <= group_size <= MAX_GROUP:
        raise ValueError(
            f"group_size: the kernel holds a group in one program, expected 1 .. {MAX_GROUP}, got {group_size}"
        )


def _launch(
    ids: Tensor,
    lengths: Tensor,
    table: TokenTable,
    target: Tensor | None,
    group_size: int,
    options: dict[str, Any],
    lanes: int,
) -> list[Tensor]:
    """Allocate the outputs and launch once; the outputs are those of BoxReward, the last four empty without a
    target. `lanes` a program, about."""
    _check_layout(table, group_size)
    rows, tokens = ids.shape
    groups = rows // group_size
    shapes = [
        (rows, 4),
        (rows,),
        (rows,),
        *([(rows,), (rows,), (rows,), (groups,)] if target is not None else [(0,)] * 4),
    ]
    dtypes = [torch.float32, torch.bool, torch.bool, torch.float32, torch.float32, torch.float32, torch.bool]
    out = [torch.empty(s, dtype=d, device=ids.device) for s, d in zip(shapes, dtypes, strict=True)]
    if rows:
        block = triton.next_power_of_2(group_size)
        side_by_side = max(1, lanes // block)
        raw = [o.view(torch.uint8) if o.dtype == torch.bool else o for o in out]
        box_reward_kernel[(triton.cdiv(groups, side_by_side),)](
            ids, lengths, table.offsets, table.classes, table.transitions, table.final, out[0] if target is None else target, *raw,
            rows, tokens, table.vocab_size, group_size, ids.stride(0), ids.stride(1), lengths.stride(0),
            **options, REWARD=target is not None, GROUPS=side_by_side, BLOCK=block, UNROLL=8,
            num_warps=max(1, min(16, side_by_side * block // 32)), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def read_boxes_triton(
    ids: Tensor, lengths: Tensor, table: TokenTable, *, which: str, grammar: str, lanes: int = 32
) -> BoxReading:
    """`reference.read_boxes` in one launch; arguments as there, checked by the caller."""
    options = {
        "SHAPE": shape_iou,
        "READ": WHICH.index(which),
        "FORMAT": GRAMMARS[grammar],
        "NORMALIZE": False,
    }
    options |= {"shape_weight": 0.0, "format_weight": 0.0, "rising": 0.0}
    return BoxReading(*_launch(ids, lengths, table, None, 1, options, lanes)[:3])


def box_reward_triton(
    ids: Tensor,
    lengths: Tensor,
    table: TokenTable,
    target_boxes: Tensor,
    group_size: int,
    *,
    which: str,
    grammar: str,
    shape: str,
    format_weight: float,
    normalize_std: bool,
    progress: float,
    lanes: int = 32,
) -> BoxReward:
    """`reference.box_reward` in one launch; arguments as there, checked by the caller. ValueError for a group
    of more than MAX_GROUP."""
    options = {
        "SHAPE": SHAPES[shape],
        "READ": WHICH.index(which),
        "FORMAT": GRAMMARS[grammar],
        "NORMALIZE": normalize_std,
    }
    options |= {
        "shape_weight": 1 - format_weight,
        "format_weight": format_weight,
        "rising": 0.25 + 0.5 * progress,
    }
    return BoxReward(*_launch(ids, lengths, table, target_boxes.contiguous(), group_size, options, lanes))
