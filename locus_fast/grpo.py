"""Group relative policy optimisation: pure functions of named tensors. A variant is another function or another number.

A batch's loss is sum(weight * token_loss) / denominator. The denominator belongs to the whole batch and is known only once every reply is
sampled, while a microbatch's gradient is taken before the next one is sampled; so the functions here return sums, and the optimizer step divides.

Legend: T reply tokens. Sources: clipped surrogate, Schulman et al. 2017 (arXiv 1707.06347), equation 7; group advantages, Shao et al. 2024
(arXiv 2402.03300); separate clip bounds, Yu et al. 2025 (arXiv 2503.14476); k3, Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def k3(logprob: Tensor, reference: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) for tokens drawn from the policy, >= 0, same shape: r - log r - 1 with r = reference / policy."""
    log_ratio = reference - logprob
    return log_ratio.exp() - log_ratio - 1


def clipped_surrogate(logprob: Tensor, old: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor, Tensor]:
    """-min(ratio * advantage, clip(ratio, 1 - clip_low, 1 + clip_high) * advantage) of each token, all arguments of one shape.

    Returns (token loss, clipped low, clipped high); the latter two are booleans: where the bound took effect and the gradient is zero.
    """
    ratio = (logprob - old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    low = (ratio < 1 - clip_low) & (advantage < 0)
    high = (ratio > 1 + clip_high) & (advantage > 0)
    return loss, low, high


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss of T reply tokens, to be divided by the batch's denominator, and sums over tokens for the metrics.

    logprob, old, reference (None without a KL term), advantage, weight: float32 [T]; gradients flow to `logprob` alone.
    Metrics: clip_low, clip_high (tokens clipped), kl (nats), ratio_max; all 0-d tensors without gradient.
    """
    loss, low, high = clipped_surrogate(logprob, old.detach(), advantage, clip_low, clip_high)
    detached = logprob.detach()
    metrics = {
        "clip_low": low.sum(),
        "clip_high": high.sum(),
        "ratio_max": (detached - old).exp().amax() if len(detached) else torch.zeros((), device=detached.device),
        "kl": torch.zeros((), device=detached.device),
    }
    if reference is not None:
        divergence = k3(logprob, reference.detach())
        loss = loss + kl_coefficient * divergence
        metrics["kl"] = divergence.detach().sum()
    return (loss * weight).sum(), metrics
