"""The clipped GRPO objective on top of the head's log-probabilities, in plain PyTorch.

    ratio = exp(log-prob - old),   k3 = exp(reference - log-prob) - (reference - log-prob) - 1
    token loss = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + kl_coefficient * k3
    loss = sum of token_weight * token loss

Both exponents are clamped to [-log_ratio_clamp, log_ratio_clamp] and k3 to at most kl_clamp; a token past one
of these has no gradient through it.

Legend: T tokens, A advantages.
Sources: clipped surrogate, Schulman et al. 2017 (arXiv 1707.06347), equation 7; separate clip bounds, Yu et
al. 2025 (arXiv 2503.14476); k3, Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from locus_kernels.linear_logprob import reference as head
from locus_kernels.linear_logprob.records import Scale

METRICS = ("clip_low", "clip_high", "kl", "entropy", "ratio_clamped", "kl_clamped", "ratio_max", "ratio_min")


class Numbers(NamedTuple):
    """The objective's constants, see above; both clamps may be infinite."""

    clip_low: float
    clip_high: float
    kl_coefficient: float
    log_ratio_clamp: float
    kl_clamp: float


class Tokens(NamedTuple):
    """What the objective knows of each of T tokens; all floating [T], without gradient."""

    advantages: Tensor
    old_logprob: Tensor | None  # None: the ratio is 1
    reference_logprob: Tensor | None  # None: no KL term
    token_weight: Tensor | None  # None: 1


def objective(logprob: Tensor, tokens: Tokens, numbers: Numbers) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(token loss times its weight, its derivative to the log-prob, both [T] and of the dtype of logprob [T];
    what `METRICS` are made of: ratio and kl, [T], and clip_low, clip_high, ratio_clamped and kl_clamped, bool
    [T]); no autograd needed."""
    advantages, old_logprob, reference_logprob, token_weight = tokens
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


class Result(NamedTuple):
    """What the forward pass gives; float32, or float64 for float64 inputs, and lse always float64."""

    loss: Tensor  # [], the sum over tokens
    logprob: Tensor  # [T]
    lse: Tensor  # [T], log-sum-exp of the scaled logits
    entropy: Tensor  # [T]
    slope: Tensor  # [T], d loss / d log-prob
    metrics: Tensor  # [8], in the order of `METRICS`


def forward(
    hidden: Tensor, weight: Tensor, ids: Tensor, tokens: Tokens, numbers: Numbers, scale: Scale
) -> Result:
    """The objective on the head's log-probs as they are returned, so that a reference of the same weights is
    at a KL of exactly 0. What else lies between inputs and results is float64."""
    logprob, entropy, lse = head.unrounded(hidden, weight, ids, scale)
    dtype = head.compute_dtype(hidden.dtype)
    logprob = logprob.to(dtype).double()
    wide = Tokens(tokens.advantages.double(), *(t if t is None else t.double() for t in tokens[1:]))
    loss, slope, seen = objective(logprob, wide, numbers)
    ratio = seen.pop("ratio")
    sums = {name: value.sum().double() for name, value in {**seen, "entropy": entropy}.items()}
    sums["ratio_max"] = ratio.amax() if len(ratio) else ratio.sum()
    sums["ratio_min"] = ratio.amin() if len(ratio) else ratio.sum()
    metrics = torch.stack([sums[name] for name in METRICS])
    narrow = [t.to(dtype) for t in (loss.sum(), logprob, entropy, slope, metrics)]
    return Result(narrow[0], narrow[1], lse, *narrow[2:])
