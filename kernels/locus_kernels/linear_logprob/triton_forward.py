"""The head's forward pass: one pass of matrix tiles over the vocabulary, then a merge. No atomics.

1. `partial_kernel`: a program owns a tile of [ROWS, COLUMNS] logits; token tiles come fastest, so the weight
   streams through the cache once. It leaves three numbers a row: the tile's maximum m of y, the sum of
   exp(y - m), and the sum of (y - m) exp(y - m). The target's logit comes out of the same accumulator.
2. `finish_kernel` merges them into log-sum-exp, log-prob and entropy.

Legend: T tokens, V vocabulary, D hidden size, N vocabulary tiles. Formulas: `reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from locus_kernels.linear_logprob.records import Scale
from locus_kernels.linear_logprob.triton_head import Head, check_device, logit_tile, tanh

FINAL_ROWS, FINAL_TILES = 16, 64  # a program of the merging kernels: rows, and vocabulary tiles read at once


# ---------------------------------------------------------------------------------------------------- kernels
@triton.jit(do_not_specialize=["T", "V"])
def partial_kernel(
    hidden, weight, ids, maximum, total, weighted, target, T, V, D, hidden_stride, weight_stride,
    inverse_temperature, softcap, inverse_softcap,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """maximum, total, weighted float32 [N, T]; target float32 [T], written by the one program whose tile
    holds the row's id."""
    row_tiles = tl.cdiv(T, ROWS)
    tile = tl.program_id(0) // row_tiles
    first_row = (tl.program_id(0) % row_tiles) * ROWS
    first_column = tile * COLUMNS
    y = logit_tile(
        hidden, weight, first_row, first_column, T, V, D, hidden_stride, weight_stride,
        ROWS, COLUMNS, DEPTH, EVEN, DESCRIPTORS, UPCAST,
    )  # fmt: skip
    if CAPPED:
        y = softcap * tanh(y * inverse_softcap)
    y = y * inverse_temperature
    columns = first_column + tl.arange(0, COLUMNS)
    rows = first_row + tl.arange(0, ROWS)
    real = rows < T
    id = tl.load(ids + rows, mask=real, other=-1)
    hit = real & (id >= first_column) & (id < first_column + COLUMNS) & (id < V)
    tl.store(target + rows, tl.sum(tl.where(columns[None, :] == id[:, None], y, 0.0), 1), mask=hit)
    y = tl.where((columns < V)[None, :], y, float("-inf"))
    m = tl.max(y, 1)
    y = y - m[:, None]
    exponential = tl.exp(y)
    out = tile.to(tl.int64) * T + rows
    tl.store(maximum + out, m, mask=real)
    tl.store(total + out, tl.sum(exponential, 1), mask=real)
    tl.store(weighted + out, tl.sum(tl.where(exponential > 0, y * exponential, 0.0), 1), mask=real)


@triton.jit
def merge(maximum, total, weighted, rows, T, N, TILES: tl.constexpr):
    """(log-sum-exp float64, entropy float32) of `rows` from the partials of all N tiles; rows past T repeat
    the last. Rounded to float32, the log-sum-exp would shift all of a row's probabilities alike."""
    rows = tl.minimum(rows, T - 1)
    m = tl.full(rows.shape, float("-inf"), tl.float32)
    for start in range(0, N, TILES):
        tiles = start + tl.arange(0, TILES)
        offset = tiles[:, None].to(tl.int64) * T + rows[None, :]
        m = tl.maximum(
            m, tl.max(tl.load(maximum + offset, mask=(tiles < N)[:, None], other=float("-inf")), 0)
        )
    s = tl.zeros(rows.shape, tl.float32)
    u = tl.zeros(rows.shape, tl.float32)
    for start in range(0, N, TILES):
        tiles = start + tl.arange(0, TILES)
        inside = (tiles < N)[:, None]
        offset = tiles[:, None].to(tl.int64) * T + rows[None, :]
        part = tl.load(total + offset, mask=inside, other=0.0)
        shift = tl.where(inside, tl.load(maximum + offset, mask=inside, other=0.0) - m[None, :], 0.0)
        factor = tl.exp(shift)
        s += tl.sum(part * factor, 0)
        u += tl.sum((tl.load(weighted + offset, mask=inside, other=0.0) + shift * part) * factor, 0)
    log_s = tl.log(s.to(tl.float64))
    return m.to(tl.float64) + log_s, (log_s - (u / s).to(tl.float64)).to(tl.float32)


@triton.jit(do_not_specialize=["T", "N"])
def finish_kernel(
    maximum, total, weighted, target, logprob, entropy, lse, T, N, ROWS: tl.constexpr, TILES: tl.constexpr
):
    """logprob, entropy float32 [T] and lse float64 [T] from the partials [N, T] and target [T]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < T
    row_lse, row_entropy = merge(maximum, total, weighted, rows, T, N, TILES)
    tl.store(
        logprob + rows,
        (tl.load(target + rows, mask=real, other=0.0).to(tl.float64) - row_lse).to(tl.float32),
        mask=real,
    )
    tl.store(entropy + rows, row_entropy, mask=real)
    tl.store(lse + rows, row_lse, mask=real)


# -------------------------------------------------------------------------------------------------- launchers
def partials(
    hidden: Tensor, weight: Tensor, ids: Tensor, scale: Scale, descriptors: bool | None = None
) -> list[Tensor]:
    """[maximum, total, weighted] float32 [N, T] and target float32 [T] (NaN for an id outside the
    vocabulary), for `merge`. T > 0."""
    head = Head(hidden, weight, scale, descriptors)
    T, D = hidden.shape
    V = len(weight)
    N = triton.cdiv(V, head.tiles.columns)
    out = [torch.empty((N, T), dtype=torch.float32, device=hidden.device) for _ in range(3)]
    out.append(hidden.new_full((T,), torch.nan, dtype=torch.float32))
    grid = (triton.cdiv(T, head.tiles.rows) * N,)
    strides = head.hidden.stride(0), head.weight.stride(0)
    with torch.cuda.device_of(hidden):
        partial_kernel[grid](
            *head.matrices(), ids.contiguous(), *out, T, V, D, *strides, *head.scalars, **head.constants
        )
    return out


def forward(
    hidden: Tensor, weight: Tensor, ids: Tensor, scale: Scale, *, descriptors: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob, entropy float32 [T]; log-sum-exp float64 [T]), as `reference.forward`. `descriptors` forces
    or forbids the bulk copy engine (None: by chip)."""
    check_device(hidden)
    T = len(hidden)
    logprob, entropy = (torch.empty(T, dtype=torch.float32, device=hidden.device) for _ in range(2))
    lse = torch.empty(T, dtype=torch.float64, device=hidden.device)
    if T:
        parts = partials(hidden, weight, ids, scale, descriptors)
        with torch.cuda.device_of(hidden):
            finish_kernel[(triton.cdiv(T, FINAL_ROWS),)](
                *parts, logprob, entropy, lse, T, len(parts[0]), ROWS=FINAL_ROWS, TILES=FINAL_TILES
            )
    return logprob, entropy, lse
