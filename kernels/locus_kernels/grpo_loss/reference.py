"""The clipped GRPO objective on top of the head's log-probabilities, in plain PyTorch.

    ratio = exp(log-prob - old),   token loss = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + kl_coefficient * k3
    k3 = exp(reference - log-prob) - (reference - log-prob) - 1,   loss = sum of token_weight * token loss

Legend: T tokens. Sources: clipped surrogate, Schulman et al. 2017 (arXiv 1707.06347), equation 7; separate clip bounds, Yu et al. 2025
(arXiv 2503.14476); k3, Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

import torch
from torch import Tensor

from locus_kernels.linear_logprob import reference as head

METRICS = ("clip_low", "clip_high", "kl", "entropy", "ratio_max", "ratio_min")


def objective(
    logprob: Tensor, advantages: Tensor, old_logprob: Tensor | None, reference_logprob: Tensor | None, token_weight: Tensor | None,
    clip_low: float, clip_high: float, kl_coefficient: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(token loss times its weight, its derivative to the log-prob, ratio, k3), all [T] and of the dtype of logprob [T]; no autograd needed."""
    ratio = torch.ones_like(logprob) if old_logprob is None else (logprob - old_logprob).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    stopped = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))
    slope = torch.where(stopped, 0.0, -ratio * advantages)
    k3 = torch.zeros_like(logprob)
    if reference_logprob is not None:
        log_ratio = reference_logprob - logprob
        k3 = log_ratio.exp() - log_ratio - 1
        loss = loss + kl_coefficient * k3
        slope = slope + kl_coefficient * (1 - log_ratio.exp())
    return (loss, slope, ratio, k3) if token_weight is None else (loss * token_weight, slope * token_weight, ratio, k3)


def forward(
    hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor, old_logprob: Tensor | None, reference_logprob: Tensor | None,
    token_weight: Tensor | None, clip_low: float, clip_high: float, kl_coefficient: float, temperature: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [], log-prob [T], log-sum-exp [T], entropy [T], d loss / d log-prob [T], metrics [6] in the order of `METRICS`).

    float32, or float64 for float64 inputs; the log-sum-exp always float64, and so is the arithmetic between.
    """
    logprob, entropy, lse = head.unrounded(hidden, weight, ids, temperature, softcap)
    old, anchor, share = (t if t is None else t.double() for t in (old_logprob, reference_logprob, token_weight))
    loss, slope, ratio, k3 = objective(logprob, advantages.double(), old, anchor, share, clip_low, clip_high, kl_coefficient)
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    extremes = (ratio.amax(), ratio.amin()) if len(ratio) else (ratio.sum(), ratio.sum())
    metrics = torch.stack([low.sum().double(), high.sum().double(), k3.sum(), entropy.sum(), *extremes])
    loss, logprob, entropy, slope, metrics = (t.to(head.compute_dtype(hidden.dtype)) for t in (loss.sum(), logprob, entropy, slope, metrics))
    return loss, logprob, lse, entropy, slope, metrics
