"""The GRPO loss on the head's partials: merge, objective and derivative in one small kernel, then one program
for the sums. No atomics.

The matrix work is `linear_logprob`'s, in forward and in backward; formulas: `reference.py`.

Legend: T tokens, N vocabulary tiles, P programs of the objective kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from locus_kernels.grpo_loss.reference import METRICS, Numbers, Result, Tokens
from locus_kernels.linear_logprob.records import Scale
from locus_kernels.linear_logprob.triton_forward import FINAL_ROWS, FINAL_TILES, merge, partials
from locus_kernels.linear_logprob.triton_head import check_device

SUMS = 1 + len(METRICS)  # the loss, then the metrics: sums, but for the last two, ratio max and ratio min
SUM_BLOCK = 128


@triton.jit(do_not_specialize=["T", "N", "P"])
def objective_kernel(
    maximum, total, weighted, target, advantages, old, reference, token_weight,
    logprob, lse, entropy, slope, sums, T, N, P,
    lowest, highest, kl_coefficient, log_ratio_clamp, kl_clamp,
    HAS_OLD: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """logprob, entropy, slope (d loss / d log-prob) float32 [T], lse float64 [T]; sums float32 [9, P] in the
    order of `SUMS`. Between, a row's arithmetic is float64: there is little of it."""
    program = tl.program_id(0)
    rows = program * ROWS + tl.arange(0, ROWS)
    real = rows < T
    row_lse, row_entropy = merge(maximum, total, weighted, rows, T, N, TILES)
    row_logprob = tl.load(target + rows, mask=real, other=0.0).to(tl.float64) - row_lse
    advantage = tl.load(advantages + rows, mask=real, other=0.0).to(tl.float64)
    ratio = tl.full((ROWS,), 1.0, tl.float64)
    ratio_clamped = ratio < 0
    if HAS_OLD:
        difference = row_logprob - tl.load(old + rows, mask=real, other=0.0)
        ratio_clamped = tl.abs(difference) > log_ratio_clamp
        ratio = tl.exp(tl.minimum(tl.maximum(difference, -log_ratio_clamp), log_ratio_clamp))
    clipped = tl.minimum(tl.maximum(ratio, lowest), highest)
    loss = -tl.minimum(ratio * advantage, clipped * advantage)
    # minimum and maximum drop NaN: an id outside the vocabulary must show
    loss = tl.where(row_logprob == row_logprob, loss, row_logprob)
    low = (ratio < lowest) & (advantage < 0)
    high = (ratio > highest) & (advantage > 0)
    row_slope = tl.where(low | high | ratio_clamped, 0.0, -ratio * advantage)
    k3 = tl.zeros((ROWS,), tl.float64)
    kl_clamped = k3 < 0
    if HAS_REFERENCE:
        log_ratio = tl.load(reference + rows, mask=real, other=0.0) - row_logprob
        kl_clamped = tl.abs(log_ratio) > log_ratio_clamp
        log_ratio = tl.minimum(tl.maximum(log_ratio, -log_ratio_clamp), log_ratio_clamp)
        inverse = tl.exp(log_ratio)
        k3 = inverse - log_ratio - 1.0
        kl_clamped = kl_clamped | (k3 > kl_clamp)
        k3 = tl.minimum(k3, kl_clamp)
        loss += kl_coefficient * k3
        row_slope += tl.where(kl_clamped, 0.0, kl_coefficient * (1.0 - inverse))
    if HAS_WEIGHT:
        share = tl.load(token_weight + rows, mask=real, other=0.0)
        loss *= share
        row_slope *= share
    tl.store(logprob + rows, row_logprob.to(tl.float32), mask=real)
    tl.store(lse + rows, row_lse, mask=real)
    tl.store(entropy + rows, row_entropy, mask=real)
    tl.store(slope + rows, row_slope.to(tl.float32), mask=real)
    tl.store(sums + program, tl.sum(tl.where(real, loss, 0.0), 0).to(tl.float32))
    tl.store(sums + P + program, tl.sum((low & real).to(tl.float32), 0))
    tl.store(sums + 2 * P + program, tl.sum((high & real).to(tl.float32), 0))
    tl.store(sums + 3 * P + program, tl.sum(tl.where(real, k3, 0.0), 0).to(tl.float32))
    tl.store(sums + 4 * P + program, tl.sum(tl.where(real, row_entropy, 0.0), 0))
    tl.store(sums + 5 * P + program, tl.sum((ratio_clamped & real).to(tl.float32), 0))
    tl.store(sums + 6 * P + program, tl.sum((kl_clamped & real).to(tl.float32), 0))
    tl.store(sums + 7 * P + program, tl.max(tl.where(real, ratio, float("-inf")), 0).to(tl.float32))
    tl.store(sums + 8 * P + program, tl.min(tl.where(real, ratio, float("inf")), 0).to(tl.float32))


@triton.jit(do_not_specialize=["P"])
def sum_kernel(sums, out, P, BLOCK: tl.constexpr):
    """out float32 [9] from sums [9, P]: program n reduces line n; the last two are a maximum and a
    minimum."""
    line = tl.program_id(0)
    added = tl.zeros((BLOCK,), tl.float32)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, P, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(sums + line * P + place, mask=place < P, other=0.0)
        added += value
        largest = tl.maximum(largest, tl.where(place < P, value, float("-inf")))
        least = tl.minimum(least, tl.where(place < P, value, float("inf")))
    result = tl.sum(added, 0)
    result = tl.where(line == 7, tl.max(largest, 0), result)
    tl.store(out + line, tl.where(line == 8, tl.min(least, 0), result))


def forward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    tokens: Tokens,
    numbers: Numbers,
    scale: Scale,
    *,
    descriptors: bool | None = None,
) -> Result:
    """As `reference.forward`, for float32 and narrower; three launches. `descriptors`: as in the head's
    `forward`."""
    check_device(hidden)
    T = len(hidden)
    logprob, entropy, slope = (torch.empty(T, dtype=torch.float32, device=hidden.device) for _ in range(3))
    lse = torch.empty(T, dtype=torch.float64, device=hidden.device)
    if T == 0:
        zeros = hidden.new_zeros(SUMS, dtype=torch.float32)
        return Result(zeros[0].clone(), logprob, lse, entropy, slope, zeros[1:].clone())
    P = triton.cdiv(T, FINAL_ROWS)
    parts = partials(hidden, weight, ids, scale, descriptors)
    sums = torch.empty((SUMS, P), dtype=torch.float32, device=hidden.device)
    out = torch.empty(SUMS, dtype=torch.float32, device=hidden.device)
    # a vector that is not given is not read
    vectors = [tokens.advantages if t is None else t.float().contiguous() for t in tokens]
    flags = {
        "HAS_OLD": tokens.old_logprob is not None,
        "HAS_REFERENCE": tokens.reference_logprob is not None,
        "HAS_WEIGHT": tokens.token_weight is not None,
    }
    bounds = (1 - numbers.clip_low, 1 + numbers.clip_high, *numbers[2:])
    with torch.cuda.device_of(hidden):
        objective_kernel[(P,)](
            *parts, *vectors, logprob, lse, entropy, slope, sums, T, len(parts[0]), P, *bounds,
            **flags, ROWS=FINAL_ROWS, TILES=FINAL_TILES,
        )  # fmt: skip
        sum_kernel[(SUMS,)](sums, out, P, BLOCK=SUM_BLOCK)
    return Result(out[0].clone(), logprob, lse, entropy, slope, out[1:].clone())
