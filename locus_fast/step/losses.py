"""Group relative policy optimisation: pure functions of named tensors. A variant is another function or another number.

A batch's loss is sum(weight * token_loss) / denominator. The denominator belongs to the whole batch and is known only once every reply is
sampled, while a microbatch's gradient is taken before the next one is sampled; so the functions here return sums, and the optimizer step divides.

Legend: T reply tokens. Sources: clipped surrogate, Schulman et al. 2017 (arXiv 1707.06347), equation 7; group advantages, Shao et al. 2024
(arXiv 2402.03300); separate clip bounds, Yu et al. 2025 (arXiv 2503.14476); k3, Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def k3(logprob: Tensor, reference: Tensor, log_ratio_clamp: float, kl_clamp: float) -> tuple[Tensor, Tensor]:
    """The k3 estimate of KL(policy || reference) for tokens drawn from the policy, >= 0, same shape: r - log r - 1 with
    r = reference / policy.

    log r is clamped to [-log_ratio_clamp, log_ratio_clamp] and the estimate to at most kl_clamp (math.inf: no clamp); a
    token past one of them has no gradient. Unclamped, one token 40 nats off would have a gradient of 2e17 and own the
    step. Returns (estimate, bool: past a clamp), same shape.
    """
    difference = reference - logprob
    log_ratio = difference.clamp(-log_ratio_clamp, log_ratio_clamp)
    estimate = log_ratio.exp() - log_ratio - 1
    return estimate.clamp(max=kl_clamp), (difference.abs() > log_ratio_clamp) | (estimate > kl_clamp)


def clipped_surrogate(
    logprob: Tensor, old: Tensor, advantage: Tensor, clip_low: float, clip_high: float, log_ratio_clamp: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """-min(ratio * advantage, clip(ratio, 1 - clip_low, 1 + clip_high) * advantage) of each token, all arguments of one shape.

    log ratio = logprob - old, clamped to [-log_ratio_clamp, log_ratio_clamp]. Returns (token loss, ratio, booleans:
    clip_low and clip_high, where a bound took effect and the gradient is zero; ratio_clamped, past the clamp).
    """
    difference = logprob - old
    ratio = difference.clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    low = (ratio < 1 - clip_low) & (advantage < 0)
    high = (ratio > 1 + clip_high) & (advantage > 0)
    return loss, ratio, {"clip_low": low, "clip_high": high, "ratio_clamped": difference.abs() > log_ratio_clamp}


def token_mean(lengths: Tensor, on_host: Sequence[int]) -> tuple[Tensor, int]:
    """Every token of the batch counts the same. lengths int64 [R], and the same on the host.

    Returns (weight of a token of each reply, float32 [R]; what these replies add to the batch's denominator: their tokens).
    """
    return torch.ones(len(lengths), device=lengths.device), sum(on_host)


def sequence_mean(lengths: Tensor, on_host: Sequence[int]) -> tuple[Tensor, int]:
    """Every reply of the batch counts the same, whatever its length. As `token_mean`; the denominator counts replies."""
    return 1.0 / lengths.float(), len(on_host)


MEANS: dict[str, Callable[[Tensor, Sequence[int]], tuple[Tensor, int]]] = {"token": token_mean, "sequence": sequence_mean}


def grpo_loss(
    logprob: Tensor,
    *,
    old: Tensor,
    reference: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    clip_low: float,
    clip_high: float,
    kl_coefficient: float,
    log_ratio_clamp: float = math.inf,
    kl_clamp: float = math.inf,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss of T reply tokens, to be divided by the batch's denominator, and sums over tokens for the metrics.

    logprob, old, reference (None without a KL term), advantage, weight: float32 [T]; gradients flow to `logprob` alone.
    Metrics: clip_low, clip_high (tokens clipped), ratio_clamped, kl_clamped (tokens past a clamp, see `k3` and
    `clipped_surrogate`), kl (nats), ratio_max; all 0-d tensors without gradient.
    """
    loss, ratio, seen = clipped_surrogate(logprob, old.detach(), advantage, clip_low, clip_high, log_ratio_clamp)
    none = torch.zeros((), device=logprob.device)
    metrics = {name: where.sum() for name, where in seen.items()}
    metrics |= {"kl_clamped": none, "kl": none, "ratio_max": ratio.detach().amax() if len(ratio) else none}
    if reference is not None:
        divergence, past = k3(logprob, reference.detach(), log_ratio_clamp, kl_clamp)
        loss = loss + kl_coefficient * divergence
        metrics |= {"kl_clamped": past.sum(), "kl": divergence.detach().sum()}
    return (loss * weight).sum(), metrics
