"""The trainer's GRPO objective of given log-probs, by names and numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from locus_fast.step.losses import LossInputs, Objective


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
    """(weighted sum of the tokens' losses, sums for the metrics); all tokens are one reply's."""
    objective = Objective(
        loss="grpo",
        kl_estimator="k3",
        clip_low=clip_low,
        clip_high=clip_high,
        delta=math.inf,
        kl_coef=kl_coefficient,
        entropy_coef=0.0,
        log_ratio_clamp=log_ratio_clamp,
        kl_clamp=kl_clamp,
    )
    row = torch.zeros(len(logprob), dtype=torch.int64, device=logprob.device)
    lengths = torch.tensor([len(logprob)], device=logprob.device)
    entropy = torch.zeros_like(logprob)
    return objective(LossInputs(logprob, old, reference, advantage, weight, row, lengths, entropy))
