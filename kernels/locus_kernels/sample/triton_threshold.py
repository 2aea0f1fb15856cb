"""Scores and thresholds of the sampling kernels: how a logit is read, and the search for top-k and top-p.

`threshold_kernel`, a program a row: the logit of the last token kept, by a search over the float's 32 bits,
four at a time, in eight reads of the row (which the second cache holds) and eight more where both are asked
for. No sort.

Legend: R rows, V vocabulary ids (`vocab`).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SEARCH_TILE = 1024  # ids a step of the search


# ----------------------------------------------------------------------------------------------------- scores
@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def scores(logits, at, stride_v, inside, inverse_temperature):
    """Logits in float32 over the temperature; -inf past the end."""
    raw = tl.load(logits + at.to(tl.int64) * stride_v, mask=inside, other=float("-inf"))
    return raw.to(tl.float32) * inverse_temperature


@triton.jit
def may_draw(allowed, at, inside, MASKED: tl.constexpr):
    permitted = inside
    if MASKED:
        permitted = tl.load(allowed + at, mask=inside, other=0) != 0
    return permitted


@triton.jit
def safe(maximum):
    """The maximum to subtract: 0 where there is nothing but -inf, so that no -inf - -inf arises."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def key_of(x):
    """A float32's bits as an integer in [0, 2**32), int64, in the order of the floats; -0 counts as 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -1 - bits, bits ^ -2147483648).to(tl.int64) & 4294967295


# ----------------------------------------------------------------------------------------------------- search
@triton.jit
def _search(
    logits, stride_v, allowed, vocab, inverse_temperature, highest, floor, goal,
    COUNT: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key k >= floor such that the tokens with keys >= k number `goal` (COUNT) or hold `goal` of
    the mass of those with keys >= floor."""
    low = floor
    enough = goal
    for digit in range(8):
        width = tl.full((), 1, tl.int64) << (28 - 4 * digit)
        pivot = low + tl.arange(0, 16).to(tl.int64) * width
        held = tl.zeros((16,), tl.float32)
        total = tl.zeros((), tl.float32)
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = scores(logits, at, stride_v, at < vocab, inverse_temperature)
            x = tl.where(may_draw(allowed, at, at < vocab, MASKED), x, float("-inf"))
            key = key_of(x)
            mass = tl.where((x > float("-inf")) & (key >= floor), 1.0, 0.0)
            if not COUNT:
                mass = mass * exp(tl.where(x > float("-inf"), x, highest) - highest)
            held += tl.sum(tl.where(key[None, :] >= pivot[:, None], mass[None, :], 0.0), 1)
            total += tl.sum(mass)
        if not COUNT:
            enough = tl.where(digit == 0, goal * total, enough)
        reached = tl.max(tl.where((held >= enough) & (pivot <= 4294967295), tl.arange(0, 16), 0))
        low = low + reached.to(tl.int64) * width
    return low


@triton.jit(do_not_specialize=["top_k"])
def threshold_kernel(
    logits, allowed, threshold, vocab, stride_r, stride_v, inverse_temperature, top_k, top_p,
    K: tl.constexpr, P: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program r: the smallest key that row r keeps, int64."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_r
    key = tl.full((), 0, tl.int64)
    highest = tl.full((), 0.0, tl.float32)
    if P:
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = scores(logits, at, stride_v, at < vocab, inverse_temperature)
            best = tl.maximum(best, tl.where(may_draw(allowed, at, at < vocab, MASKED), x, float("-inf")))
        highest = safe(tl.max(best))
    if K:
        key = _search(
            logits, stride_v, allowed, vocab, inverse_temperature, highest, key, top_k.to(tl.float32),
            True, MASKED, BLOCK,
        )  # fmt: skip
    if P:
        key = _search(
            logits, stride_v, allowed, vocab, inverse_temperature, highest, key, top_p, False, MASKED, BLOCK
        )
    tl.store(threshold + row, key)
