"""One decoding step over shared prompts as two Triton launches.

1. `prompt_kernel`, a program per (group and tile of its rows, key head, split of the prompt): the queries of
   a group's rows that share a key head are packed into one tile, so that the tile reads a key once for all of
   them. Leaves its normalised output and its log-sum-exp, base 2.
2. `merge_kernel`, a program per (row, key head): the row's own keys, then the splits, merged by log-sum-exp.
   An empty split has -inf and no weight.

The prompt is split so that there are about as many programs as multiprocessors. Each prompt is split by its
own length. Nothing is read back, no atomics, sums in a fixed order: equal bits every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from locus_kernels.launch import INTERPRETED
from locus_kernels.shared_prefix_decode.reference import Bounds, Inputs

LOG2E = 1.4426950408889634
# Fewest keys of a split: its output and log-sum-exp, in float32, must not cost more than reading its keys
SPLIT_KEYS = 128


@dataclass(frozen=True)
class Tiles:
    """The shape of a program's work, and its compile options."""

    rows: int  # queries
    keys: int  # one step of the loop
    warps: int
    stages: int


def prompt_tiles(dtype: torch.dtype, dimension: int, queries: int, amd: bool = False) -> Tiles:
    """For `prompt_kernel`. queries: the most that a group has for one key head."""
    rows = max(16, min(128 if dimension <= 128 else 64, triton.next_power_of_2(queries)))
    if dtype == torch.float32:  # exact products without tensor cores: for checks, not for speed
        return Tiles(16, 16, 8, 1)
    keys, stages = (64, 3) if rows < 128 and dimension <= 128 else (32, 4 if rows == 128 else 3)
    return Tiles(rows, keys, 4 if rows < 64 else 8, 2 if amd else stages)


def own_tiles(dtype: torch.dtype) -> Tiles:
    """For `merge_kernel`, whose queries are heads of one row."""
    return Tiles(16, 16, 8, 1) if dtype == torch.float32 else Tiles(16, 32, 4, 2)


def choose_splits(programs: int, processors: int, longest_prompt: int) -> int:
    """Into how many parts a prompt is split when there are `programs` programs without splitting."""
    return max(1, min(triton.cdiv(processors, programs), triton.cdiv(longest_prompt, SPLIT_KEYS)))


@triton.jit
def _columns(inside, D: tl.constexpr, DEPTH: tl.constexpr):
    """The mask [.., DEPTH] of rows `inside`, without the columns past D."""
    mask = inside[:, None]
    if DEPTH > D:
        mask = mask & (tl.arange(0, DEPTH) < D)[None, :]
    return mask


@triton.jit
def _attend(
    q, k, v, begin, end, k_stride, v_stride, scale,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Queries [ROWS, DEPTH] over keys begin to end: (sum of weighted values, maximum score, sum of weights);
    scores in powers of 2."""
    key, depth = tl.arange(0, KEYS), tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    for first in range(begin, end, KEYS):
        inside = first + key < end
        mask = _columns(inside, D, DEPTH)
        at = tl.cast(first, tl.int64)
        keys = tl.load(k + at * k_stride + key[:, None] * k_stride + depth[None, :], mask=mask, other=0.0)
        values = tl.load(v + at * v_stride + key[:, None] * v_stride + depth[None, :], mask=mask, other=0.0)
        if UPCAST:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        scores = tl.where(inside[None, :], tl.dot(q, keys.T, input_precision="ieee") * scale, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        weight = tl.exp2(scores - above[:, None])
        keep = tl.exp2(highest - above)
        mass = mass * keep + tl.sum(weight, 1)
        total = tl.dot(weight.to(values.dtype), values, total * keep[:, None], input_precision="ieee")
        highest = above
    return total, highest, mass


@triton.jit(do_not_specialize=["R", "tiles"])
def prompt_kernel(
    q, prompt_k, prompt_v, cu_prompts, cu_rows, partial, lse, R, H, tiles,
    q_row, q_head, k_token, k_head, v_token, v_head, scale,
    SHARE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (group * tiles + tile, key head, split): partial float32 [splits, R, H, D] and lse float32
    [splits, R, H] of the tile's queries."""
    group, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    key_head, split, splits = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    first_row = tl.load(cu_rows + group)
    queries = (tl.load(cu_rows + group + 1) - first_row) * SHARE
    if tile * ROWS >= queries:
        return
    start = tl.load(cu_prompts + group)
    length = tl.load(cu_prompts + group + 1) - start
    part = tl.cdiv(tl.cdiv(length, KEYS), splits) * KEYS
    begin = tl.minimum(split * part, length)
    end = tl.minimum(begin + part, length)

    at, depth = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    row, head = (first_row + at // SHARE).to(tl.int64), key_head * SHARE + at % SHARE
    there = at < queries
    mask = _columns(there, D, DEPTH)
    tile_q = tl.load(q + (row * q_row + head * q_head)[:, None] + depth[None, :], mask=mask, other=0.0)
    if UPCAST:
        tile_q = tile_q.to(tl.float32)
    k = prompt_k + start.to(tl.int64) * k_token + key_head * k_head
    v = prompt_v + start.to(tl.int64) * v_token + key_head * v_head
    total, highest, mass = _attend(
        tile_q, k, v, begin, end, k_token, v_token, scale, D, ROWS, KEYS, DEPTH, UPCAST
    )
    out = (split.to(tl.int64) * R + row) * H + head
    some = mass > 0
    merged = tl.where(some, highest + tl.log2(tl.where(some, mass, 1.0)), float("-inf"))
    tl.store(lse + out, merged, mask=there)
    tl.store(
        partial + out[:, None] * D + depth[None, :],
        total / tl.where(some, mass, 1.0)[:, None],
        mask=mask & (begin < end),
    )


@triton.jit(do_not_specialize=["R", "groups", "tiles", "splits", "longest_own"])
def merge_kernel(
    q, own_k, own_v, own_lengths, cu_rows, partial, lse, out, R, H, groups, tiles, splits, longest_own,
    q_row, q_head, k_row, k_head, k_token, v_row, v_head, v_token, scale,
    SHARE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (row, key head * tiles + tile): out [R, H, D] of ROWS heads that share a key head. Rows of no
    group get 0."""
    row, key_head, tile = (
        tl.program_id(0).to(tl.int64),
        (tl.program_id(1) // tiles).to(tl.int64),
        tl.program_id(1) % tiles,
    )
    used = row < tl.load(cu_rows + groups)
    length = tl.where(used, tl.minimum(tl.load(own_lengths + row), longest_own), 0)

    at, depth = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    head = key_head * SHARE + at
    there = at < SHARE
    mask = _columns(there, D, DEPTH)
    tile_q = tl.load(q + row * q_row + (head * q_head)[:, None] + depth[None, :], mask=mask, other=0.0)
    if UPCAST:
        tile_q = tile_q.to(tl.float32)
    k, v = own_k + row * k_row + key_head * k_head, own_v + row * v_row + key_head * v_head
    total, highest, mass = _attend(
        tile_q, k, v, 0, length, k_token, v_token, scale, D, ROWS, KEYS, DEPTH, UPCAST
    )
    for split in range(0, tl.where(used, splits, 0)):
        source = (tl.cast(split, tl.int64) * R + row) * H + head
        theirs = tl.load(lse + source, mask=there, other=float("-inf"))
        some = theirs > float("-inf")  # what an empty split left in `partial` was never written
        values = tl.load(partial + source[:, None] * D + depth[None, :], mask=mask & some[:, None], other=0.0)
        above = tl.maximum(highest, theirs)
        base = tl.where(above > float("-inf"), above, 0.0)  # no -inf - -inf where there is no key yet
        keep, weight = tl.exp2(highest - base), tl.exp2(theirs - base)
        total = total * keep[:, None] + values * weight[:, None]
        mass = mass * keep + weight
        highest = above
    total = total / tl.where(mass > 0, mass, 1.0)[:, None]
    tl.store(out + (row * H + head)[:, None] * D + depth[None, :], total.to(out.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------- launcher
def shared_prefix_decode(
    inputs: Inputs, scale: float, bounds: Bounds, *, processors: int | None = None
) -> Tensor:
    """What `op.shared_prefix_decode` documents; arguments as there, checked by the caller. `processors`: how
    many programs to aim for in the first launch, by default the device's multiprocessors."""
    q, prompt_k, prompt_v, cu_prompts, own_k, own_v, own_lengths, cu_rows = inputs
    (R, H, D), K, B = q.shape, prompt_k.shape[1], cu_prompts.shape[0] - 1
    out = torch.empty(R, H, D, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    if processors is None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    share = H // K
    queries = bounds.most_rows * share
    tiles, own = prompt_tiles(q.dtype, D, queries, amd=torch.version.hip is not None), own_tiles(q.dtype)
    upcast = INTERPRETED and q.dtype == torch.bfloat16
    common: dict[str, Any] = {"SHARE": share, "D": D, "DEPTH": triton.next_power_of_2(D), "UPCAST": upcast}
    row_tiles = triton.cdiv(queries, tiles.rows)
    programs, longest = B * row_tiles * K, bounds.longest_prompt
    splits = choose_splits(programs, processors, longest) if programs and longest else 0
    partial = torch.empty(splits, R, H, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(splits, R, H, dtype=torch.float32, device=q.device)
    if splits:
        prompt_kernel[(B * row_tiles, K, splits)](
            q, prompt_k, prompt_v, cu_prompts, cu_rows, partial, lse, R, H, row_tiles,
            *q.stride()[:2], *prompt_k.stride()[:2], *prompt_v.stride()[:2], scale * LOG2E,
            **common, ROWS=tiles.rows, KEYS=tiles.keys, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    head_tiles = triton.cdiv(share, own.rows)
    merge_kernel[(R, K * head_tiles)](
        q, own_k, own_v, own_lengths, cu_rows, partial, lse, out,
        R, H, B, head_tiles, splits, bounds.longest_own,
        *q.stride()[:2], *own_k.stride()[:3], *own_v.stride()[:3], scale * LOG2E,
        **common, ROWS=own.rows, KEYS=own.keys, num_warps=own.warps, num_stages=own.stages,
    )  # fmt: skip
    return out
