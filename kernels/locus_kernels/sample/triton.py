"""Sampling as Triton kernels: one read of the logits, then one small program a row; with top-k or top-p a
threshold search before.

1. `tiles_kernel`, a program per (row, tile of BLOCK ids): maximum and sum of exponentials of the kept tokens
   and, apart, of all others, so that the log-prob is the full softmax's whatever was kept. Greedy: the
   maximum and where it is.
2. `draw_kernel`, a program a row: combine the tiles, find the tile in which the running sum passes u of the
   total, read that tile again, find the id. Sums of tiles are float64 here, so a draw differs from the
   reference's only where u is within about 1e-6 of a border between two tokens.

The search, which runs first, is in `triton_threshold.py`. Nothing is read back, and sums run in a fixed
order:
equal bits every time.

Legend: R rows, V vocabulary ids (`vocab`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from locus_kernels.sample import reference
from locus_kernels.sample.reference import Distribution, Place
from locus_kernels.sample.triton_threshold import (
    SEARCH_TILE,
    exp,
    key_of,
    may_draw,
    safe,
    scores,
    threshold_kernel,
)

GOLDEN, MIX_A, MIX_B = (
    tl.constexpr(reference.wrap(c)) for c in (reference.GOLDEN, reference.MIX_A, reference.MIX_B)
)
LN2 = tl.constexpr(0.6931471805599453)
TILE = 4096  # ids a program of the first kernel


# --------------------------------------------------------------------------------------------------- the hash
@triton.jit
def _shift(z, bits: tl.constexpr):
    return (z >> bits) & ((1 << (64 - bits)) - 1)


@triton.jit
def _mix(z):
    z = (z ^ _shift(z, 30)) * MIX_A
    z = (z ^ _shift(z, 27)) * MIX_B
    return z ^ _shift(z, 31)


@triton.jit
def _uniform(start, row, position):
    """float64 in [0, 1), as `reference.uniform`; all int64."""
    state = _mix(start + row + GOLDEN)
    state = _mix(state + position + GOLDEN)
    return _shift(state, 11).to(tl.float64) * (1.0 / 9007199254740992.0)


# --------------------------------------------------------------------------------------------------- one read
@triton.jit
def _kept(
    logits, allowed, threshold, row, at, vocab, stride_r, stride_v, inverse_temperature,
    MASKED: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """(scores of ids `at` of a row, which of them may be drawn)."""
    x = scores(logits + row * stride_r, at, stride_v, at < vocab, inverse_temperature)
    may = may_draw(allowed, at, at < vocab, MASKED)
    if CUT:
        may = may & (key_of(x) >= tl.load(threshold + row))
    return x, may


@triton.jit
def tiles_kernel(
    logits, allowed, threshold, partial, best, vocab, tiles, stride_r, stride_v, inverse_temperature,
    GREEDY: tl.constexpr, MASKED: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (r, i): (maximum, sum) of the kept and (maximum, sum) of the other tokens of tile i of row r,
    float32 [R, tiles, 4]; greedy also `best`, int32 [R, tiles], the first id that reaches the maximum."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    x, may = _kept(
        logits, allowed, threshold, row, at, vocab, stride_r, stride_v, inverse_temperature, MASKED, CUT
    )
    mine = tl.where(may, x, float("-inf"))
    top = tl.max(mine)
    out = partial + (row * tiles + tile) * 4
    if MASKED or CUT:
        top_other = tl.max(tl.where(may, float("-inf"), x))
        e = exp(x - tl.where(may, safe(top), safe(top_other)))
        total = tl.sum(tl.where(may, e, 0.0))
        tl.store(out + 2, top_other)
        tl.store(out + 3, tl.sum(tl.where(may, 0.0, e)))
    else:
        total = tl.sum(exp(x - safe(top)))
        tl.store(out + 2, float("-inf"))
        tl.store(out + 3, 0.0)
    tl.store(out, top)
    tl.store(out + 1, total)
    if GREEDY:
        tl.store(best + row * tiles + tile, tl.min(tl.where(may & (mine == top), at, vocab - 1)))


@triton.jit(do_not_specialize=["start", "position"])
def draw_kernel(
    logits, allowed, threshold, partial, best, rows, positions, ids, logprob,
    vocab, tiles, stride_r, stride_v, stride_row, stride_position, inverse_temperature, start, position,
    GREEDY: tl.constexpr, MASKED: tl.constexpr, CUT: tl.constexpr, MOVING: tl.constexpr,
    TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program r: the id that row r draws, int64, and its log-prob, float32. `positions` is read with MOVING,
    `position` without."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    there = partial + (row * tiles + tile) * 4
    top = tl.load(there, mask=tile < tiles, other=float("-inf"))
    total = tl.load(there + 1, mask=tile < tiles, other=0.0)
    top_other = tl.load(there + 2, mask=tile < tiles, other=float("-inf"))
    total_other = tl.load(there + 3, mask=tile < tiles, other=0.0)
    highest = safe(tl.max(top))
    if GREEDY:
        first = tl.load(best + row * tiles + tile, mask=tile < tiles, other=0)
        token = tl.min(tl.where((top == tl.max(top)) & (tile < tiles), first, vocab - 1))
    else:
        place = tl.full((), 0, tl.int64) + position
        if MOVING:
            place = tl.load(positions + row * stride_position).to(tl.int64)
        u = _uniform(tl.full((), 0, tl.int64) + start, tl.load(rows + row * stride_row).to(tl.int64), place)
        mass = total.to(tl.float64) * exp(top - highest).to(tl.float64)
        running = tl.cumsum(mass, 0)
        target = u * tl.max(running)
        last = tl.max(tl.where(mass > 0, tile, 0))
        chosen = tl.minimum(tl.min(tl.where(running > target, tile, TILES)), last)
        before = tl.sum(tl.where(tile < chosen, mass, 0.0))
        at = chosen * BLOCK + tl.arange(0, BLOCK)
        x, may = _kept(
            logits, allowed, threshold, row, at, vocab, stride_r, stride_v, inverse_temperature, MASKED, CUT
        )
        mass = tl.where(may, exp(x - highest), 0.0).to(tl.float64)
        running = before + tl.cumsum(mass, 0)
        last = tl.max(tl.where(mass > 0, at, 0))
        token = tl.minimum(tl.min(tl.where((running > target) & (mass > 0), at, vocab - 1)), last)
    above = tl.maximum(tl.max(top), tl.max(top_other))
    above = safe(above)
    everything = tl.sum(total * exp(top - above)) + tl.sum(total_other * exp(top_other - above))
    said = tl.load(logits + row * stride_r + token.to(tl.int64) * stride_v).to(tl.float32)
    said = said * inverse_temperature
    tl.store(ids + row, token.to(tl.int64))
    tl.store(logprob + row, said - (above + tl.log2(everything) * LN2))


# --------------------------------------------------------------------------------------------------- launcher
def sample(
    logits: Tensor, place: Place, distribution: Distribution, *, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """`reference.sample` in two launches (three with top-k or top-p); arguments as there, checked by the
    caller. `tile`: ids a program."""
    temperature, top_p, top_k, allowed = distribution
    row, position = place.row, place.position
    rows, vocab = logits.shape
    greedy, cut = temperature == 0, temperature > 0 and (0 < top_k < vocab or top_p < 1)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if not rows:
        return ids, logprob
    tiles, inverse = triton.cdiv(vocab, tile), 1.0 if greedy else 1 / temperature
    partial = torch.empty(rows, tiles, 4, dtype=torch.float32, device=logits.device)
    best = torch.empty((rows, tiles) if greedy else (1,), dtype=torch.int32, device=logits.device)
    threshold = torch.empty(rows if cut else 1, dtype=torch.int64, device=logits.device)
    mask = ids if allowed is None else allowed.contiguous().view(torch.uint8)
    flags: dict[str, Any] = {"MASKED": allowed is not None}
    strides = logits.stride()
    if cut:
        search = {"K": 0 < top_k < vocab, "P": top_p < 1, "BLOCK": min(SEARCH_TILE, tile), "num_warps": 8}
        threshold_kernel[(rows,)](
            logits, mask, threshold, vocab, *strides, inverse, top_k, float(top_p), **flags, **search
        )
    flags |= {"GREEDY": greedy, "CUT": cut, "BLOCK": tile, "num_warps": 8}
    tiles_kernel[(rows, tiles)](
        logits, mask, threshold, partial, best, vocab, tiles, *strides, inverse, **flags
    )
    moving = isinstance(position, Tensor)
    positions, fixed = (position.expand(rows), 0) if isinstance(position, Tensor) else (row, position)
    draw_kernel[(rows,)](
        logits, mask, threshold, partial, best, row, positions, ids, logprob, vocab, tiles, *strides,
        row.stride(0), positions.stride(0), inverse, reference.stream(place.seed), fixed,
        **flags, MOVING=moving, TILES=triton.next_power_of_2(tiles),
    )  # fmt: skip
    return ids, logprob
