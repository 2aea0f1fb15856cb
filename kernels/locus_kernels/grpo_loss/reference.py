"""The clipped GRPO objective on top of the head's log-probabilities, in plain PyTorch.

    ratio = exp(log-prob - old),   token loss = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + kl_coefficient * k3
    k3 = exp(reference - log-prob) - (reference - log-prob) - 1,   loss = sum of token_weight * token loss

Both exponents are clamped to [-log_ratio_clamp, log_ratio_clamp] and k3 to at most kl_clamp; a token past one
of these has no gradient through it.

Legend: T tokens. Sources: clipped surrogate, Schulman et al. 2017 (arXiv 1707.06347), equation 7; separate
clip bounds, Yu et al. 2025 (arXiv 2503.14476); k3, Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from locus_kernels.linear_logprob import reference as head

METRICS = ("clip_low", "clip_high", "kl", "entropy", "ratio_clamped", "kl_clamped", "ratio_max", "ratio_min")


class Numbers(NamedTuple):
    """The objective's constants, see above; both clamps may be infinite."""

    clip_low: float
    clip_high: float
    kl_coefficient: float
    log_ratio_clamp: float
    kl_clamp: float


def objective(
    logprob: Tensor, advantages: Tensor, old_logprob: Tensor | None, reference_logprob: Tensor | None, token_weight: Tensor | None, numbers: Numbers
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """(token loss times its weight, its derivative to the log-prob, both [T] and of the dtype of logprob [T];
    what `METRICS` are made of: ratio and kl, [T], and clip_low, clip_high, ratio_clamped and kl_clamped, bool
    [T]); no autograd needed."""
    bound = numbers.log_ratio_clamp
    difference = torch.zeros_like(logprob) if old_logprob is None else logprob - old_logprob
    ratio_clamped = difference.abs() > bound
    ratio = difference.clamp(-bound, bound).exp()
    clipped = ratio.clamp(1 - numbers.clip_low, 1 + numbers.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    low = (ratio < 1 - numbers.clip_low) & (advantages < 0)
    high = (ratio > 1 + numbers.clip_high) & (advantages > 0)
    slope = torch.where(low | high | ratio_clamped, 0.0, -ratio * advantages)
    kl, kl_clamped = torch.zeros_like(logprob), torch.zeros_like(ratio_clamped)
    if reference_logprob is not None:
        log_ratio = (reference_logprob - logprob).clamp(-bound, bound)
        k3 = log_ratio.exp() - log_ratio - 1
        kl_clamped = ((reference_logprob - logprob).abs() > bound) | (k3 > numbers.kl_clamp)
        kl = k3.clamp(max=numbers.kl_clamp)
        loss = loss + numbers.kl_coefficient * kl
        slope = slope + torch.where(kl_clamped, 0.0, numbers.kl_coefficient * (1 - log_ratio.exp()))
    seen = {
        "clip_low": low,
        "clip_high": high,
        "kl": kl,
        "ratio_clamped": ratio_clamped,
        "kl_clamped": kl_clamped,
        "ratio": ratio,
    }
    return (loss, slope, seen) if token_weight is None else (loss * token_weight, slope * token_weight, seen)


def forward(
    hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor, old_logprob: Tensor | None, reference_logprob: Tensor | None,
    token_weight: Tensor | None, numbers: Numbers, temperature: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [], log-prob [T], log-sum-exp [T], entropy [T], d loss / d log-prob [T], metrics [8] in the order
    of `METRICS`).

    float32, or float64 for float64 inputs; the log-sum-exp always float64, and so is the arithmetic between.
    """
    logprob, entropy, lse = head.unrounded(hidden, weight, ids, temperature, softcap)
    old, base, share = (
        t if t is None else t.double() for t in (old_logprob, reference_logprob, token_weight)
    )
    loss, slope, seen = objective(logprob, advantages.double(), old, base, share, numbers)
    ratio = seen.pop("ratio")
    extremes = (
        {"ratio_max": ratio.amax(), "ratio_min": ratio.amin()}
        if len(ratio)
        else dict.fromkeys(("ratio_max", "ratio_min"), ratio.sum())
    )
    sums = {name: value.sum().double() for name, value in {**seen, "entropy": entropy}.items()} | extremes
    metrics = torch.stack([sums[name] for name in METRICS])
    loss, logprob, entropy, slope, metrics = (
        t.to(head.compute_dtype(hidden.dtype)) for t in (loss.sum(), logprob, entropy, slope, metrics)
    )
    return loss, logprob, lse, entropy, slope, metrics
