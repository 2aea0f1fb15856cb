"""The reader's automaton in Triton: every lane of a program walks over the tokens of one reply.

Only the automaton's state is a chain of dependent loads (one table look-up a character, from a table of 28 KB
that stays in the first cache), so everything else is fetched ahead of it: ids, offsets and first classes of
the next UNROLL tokens are loaded before the present ones are read. Numbers are exact integers (millionths),
as in the reference.

Legend: lanes are [GROUPS, BLOCK].
"""

from __future__ import annotations

import triton
import triton.language as tl

from locus_kernels.box_reward import automaton as a
from locus_kernels.box_reward.reference import LARGEST, UNIT, WHICH

SHIFT, MASK, CLASSES = tl.constexpr(a.ACTION_SHIFT), tl.constexpr(a.STATE_MASK), tl.constexpr(a.CLASS_COUNT)
OTHER, PADDING = tl.constexpr(a.OTHER), tl.constexpr(a.PADDING)
OPEN, MINUS, DIGIT = tl.constexpr(a.OPEN), tl.constexpr(a.MINUS), tl.constexpr(a.DIGIT)
FRACTION, NEXT = tl.constexpr(a.FRACTION), tl.constexpr(a.NEXT)
CLOSE, CLOSE_IN_ANSWER = tl.constexpr(a.CLOSE), tl.constexpr(a.CLOSE_IN_ANSWER)
LAST, ANSWER = tl.constexpr(WHICH.index("last")), tl.constexpr(WHICH.index("answer"))
MILLION, TOO_MUCH = tl.constexpr(UNIT), tl.constexpr(2 * LARGEST // UNIT)


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
        begins = begins + (begin,)  # type: ignore[assignment]  # noqa: RUF005
        counts = counts + (count,)  # type: ignore[assignment]  # noqa: RUF005
        heads = heads + (symbol,)  # type: ignore[assignment]  # noqa: RUF005
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
def walk(
    ids, step, length, offsets, classes, transitions, vocab_size,
    READ: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The machine after the last token of every lane; ids: of each lane its first token, step: to the
    next."""
    machine = _start(GROUPS, BLOCK)
    begins, counts, heads = _fetch(ids, step, 0, length, offsets, classes, vocab_size, UNROLL)
    for at in range(0, tl.max(length), UNROLL):
        later = _fetch(ids, step, at + UNROLL, length, offsets, classes, vocab_size, UNROLL)
        for u in tl.static_range(UNROLL):
            symbol = heads[u]
            for c in range(1, tl.max(counts[u]) + 1):
                following = tl.load(classes + begins[u] + c, mask=c < counts[u], other=PADDING).to(tl.int32)
                machine = _step(symbol, machine, transitions, READ)
                symbol = following
        begins, counts, heads = later
    return machine
