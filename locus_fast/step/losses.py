"""The objective of a step: pure functions of named tensors, in registries by the names that options give.

    loss of a batch = sum over its reply tokens of weight * token loss / denominator

A *loss* turns `LossInputs` into the policy term of each token (`LOSSES`), a *KL estimator* into its KL term
(`KL_ESTIMATORS`), an *aggregation* gives each token its weight and the batch its denominator
(`AGGREGATIONS`). The denominator belongs to the whole batch and is known only when every reply is sampled,
while a microbatch's gradient is taken before the next one is sampled; so sums are returned here, and the
optimizer step divides.

To add a loss, write a function like `clipped_surrogate`, name it in `LOSSES`, in `LOSSES` of
`config/settings.py`, and if it brings settings of its own in `LOSS_SETTINGS` of `config/presets.py`.

The clipped surrogate is computed a second time, fused with the head, in `locus_kernels.grpo_loss`, which is
what a run takes by default: change both (tests hold them equal).

Legend: T reply tokens of a microbatch, R its replies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from locus_kernels.grpo_loss import grpo_loss
from locus_kernels.linear_logprob import linear_logprob
from torch import Tensor

from locus_fast.config import Config


@dataclass(frozen=True)
class LossInputs:
    """What a loss is computed from. Gradients flow to `logprob` and `entropy` alone."""

    logprob: Tensor  # float32 [T], of the policy as it is
    # float32 [T], of the policy that sampled; on the first update the same values, without gradient
    old: Tensor
    reference: Tensor | None  # float32 [T]; None without a KL term
    advantage: Tensor  # float32 [T], of each token's reply
    weight: Tensor  # float32 [T], of each token in the sum, see `AGGREGATIONS`
    row: Tensor  # int64 [T], the reply that each token is of, in [0, R)
    lengths: Tensor  # int64 [R], tokens of each reply; those without tokens here may have any
    entropy: Tensor  # float32 [T], of the policy at each token


@dataclass(frozen=True)
class Objective:
    """The settings of a loss, and the loss itself by call. Bounds that are off are infinite."""

    loss: str
    kl_estimator: str
    clip_low: float
    clip_high: float
    delta: float
    kl_coef: float
    entropy_coef: float
    log_ratio_clamp: float
    kl_clamp: float

    @staticmethod
    def of(config: Config) -> Objective:
        return Objective(
            loss=config.loss,
            kl_estimator=config.kl_estimator,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            delta=config.delta or math.inf,
            kl_coef=config.kl_coef,
            entropy_coef=config.entropy_coef,
            log_ratio_clamp=config.log_ratio_clamp or math.inf,
            kl_clamp=config.kl_clamp or math.inf,
        )

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """(the weighted sum of the tokens' losses, to be divided by the batch's denominator; sums over tokens
        for the metrics: clip_low, clip_high, ratio_clamped, kl_clamped, kl, and the largest ratio as
        ratio_max), all 0-d, the latter without gradient."""
        token_loss, ratio, seen = LOSSES[self.loss](inputs, self)
        none = torch.zeros((), device=token_loss.device)
        metrics = {name: where.sum() for name, where in seen.items()}
        metrics |= {
            "kl": none,
            "kl_clamped": none,
            "ratio_max": ratio.detach().amax() if len(ratio) else none,
        }
        if inputs.reference is not None:
            kl, past = clamped_kl(inputs.logprob, inputs.reference, self)
            token_loss = token_loss + self.kl_coef * kl
            metrics |= {"kl": kl.detach().sum(), "kl_clamped": past.sum()}
        if self.entropy_coef:
            token_loss = token_loss - self.entropy_coef * inputs.entropy
        return (token_loss * inputs.weight).sum(), metrics

    @property
    def has_gradient_without_advantage(self) -> bool:
        """Whether tokens whose advantage is 0 have a gradient."""
        return self.kl_coef > 0 or self.entropy_coef > 0

    @property
    def is_fused(self) -> bool:
        """Whether `locus_kernels.grpo_loss` computes it, straight from hidden states."""
        plain = LOSSES[self.loss] is clipped_surrogate and self.kl_estimator == "k3"
        return plain and self.delta == math.inf and self.entropy_coef == 0

    def from_hidden(
        self, hidden: Tensor, head: Tensor, ids: Tensor, temperature: float, rest: dict[str, Any]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(loss, log-probs float32 [T] without gradient, metrics as above and the summed entropy) of hidden
        states [T, D] that predict the tokens ids [T] through the head [V, D]: by one fused operator where it
        computes this objective. rest: the fields of `LossInputs` but logprob and entropy; old may be None for
        the policy itself.
        """
        if self.is_fused:
            loss, logprob, metrics = grpo_loss(
                hidden,
                head,
                ids,
                rest["advantage"],
                rest["old"],
                rest["reference"],
                rest["weight"],
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                kl_coefficient=self.kl_coef,
                log_ratio_clamp=self.log_ratio_clamp,
                kl_clamp=self.kl_clamp,
                temperature=temperature,
            )
            del metrics["ratio_min"]
            return loss, logprob.detach(), metrics
        logprob, entropy = linear_logprob(hidden, head, ids, temperature)
        old = logprob.detach() if rest["old"] is None else rest["old"]
        loss, metrics = self(LossInputs(**{**rest, "logprob": logprob, "old": old, "entropy": entropy}))
        return loss, logprob.detach(), metrics | {"entropy": entropy.detach().sum()}


# ------------------------------------------------------------------------------------------------- the losses
# Each returns (token loss [T], ratio [T], booleans [T] for the metrics: clip_low and clip_high,
# where a bound took effect and the gradient is 0, and ratio_clamped, where the log-ratio was past its clamp).
Terms = tuple[Tensor, Tensor, dict[str, Tensor]]


def clamped_ratio(log_ratio: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """(exp of the log-ratio within [-clamp, clamp], bool: past it, where there is no gradient)."""
    return log_ratio.clamp(-clamp, clamp).exp(), log_ratio.abs() > clamp


def surrogate(ratio: Tensor, past: Tensor, advantage: Tensor, objective: Objective) -> Terms:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) (Schulman et al. 2017, arXiv 1707.06347,
    equation 7; separate bounds: Yu et al. 2025, arXiv 2503.14476). delta bounds the first ratio from above,
    which counts where the advantage is negative (two-sided clip, INTELLECT-2, arXiv 2505.07291); it must be
    above 1 + clip_high."""
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    bounded = ratio.clamp(max=objective.delta)
    loss = -torch.minimum(bounded * advantage, ratio.clamp(low, high) * advantage)
    above = (ratio > high) & (advantage > 0) | (ratio > objective.delta) & (advantage < 0)
    return (
        loss,
        ratio,
        {"clip_low": (ratio < low) & (advantage < 0), "clip_high": above, "ratio_clamped": past},
    )


def clipped_surrogate(x: LossInputs, objective: Objective) -> Terms:
    """GRPO (Shao et al. 2024, arXiv 2402.03300): the clipped surrogate with each token's own ratio."""
    return surrogate(*clamped_ratio(x.logprob - x.old, objective.log_ratio_clamp), x.advantage, objective)


def sequence_surrogate(x: LossInputs, objective: Objective) -> Terms:
    """GSPO (Zheng et al. 2025, arXiv 2507.18071): the ratio is the reply's, the geometric mean over its
    tokens.

    In the stop-gradient form: the value of a token's ratio is its reply's, its gradient its own log-prob's.
    Summed over a reply's tokens this is the gradient of the reply's ratio times its length."""
    difference = (x.logprob - x.old).detach()
    mean = difference.new_zeros(len(x.lengths)).index_add(0, x.row, difference) / x.lengths
    log_ratio = mean[x.row] + x.logprob - x.logprob.detach()
    return surrogate(*clamped_ratio(log_ratio, objective.log_ratio_clamp), x.advantage, objective)


def clipped_weight(x: LossInputs, objective: Objective) -> Terms:
    """CISPO (MiniMax-M1, arXiv 2506.13585): REINFORCE with importance weights that are cut at 1 + clip_high
    and have no gradient, so that no token's gradient is lost. clip_low has no effect."""
    ratio, past = clamped_ratio((x.logprob - x.old).detach(), objective.log_ratio_clamp)
    high = 1 + objective.clip_high
    loss = -ratio.clamp(max=high) * x.advantage * x.logprob
    return loss, ratio, {"clip_low": torch.zeros_like(past), "clip_high": ratio > high, "ratio_clamped": past}


LOSSES: dict[str, Callable[[LossInputs, Objective], Terms]] = {
    "grpo": clipped_surrogate,
    "dr_grpo": clipped_surrogate,  # these three differ in settings alone: config.presets.LOSS_SETTINGS
    "bnpo": clipped_surrogate,
    "dapo": clipped_surrogate,
    "gspo": sequence_surrogate,
    "cispo": clipped_weight,
}


# ---------------------------------------------------------------------------------------------- KL estimators
# Of KL(policy || reference), for tokens drawn from the policy, from log(reference / policy) [T]:
# Schulman 2020, "Approximating KL divergence". All three are used in the loss, so their gradients count, not
# their values: that of k1 is 0 on average while on-policy, that of k2 the KL's, that of k3 the reverse
# direction's.
def k1(log_ratio: Tensor) -> Tensor:
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    return log_ratio.exp() - log_ratio - 1


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def clamped_kl(logprob: Tensor, reference: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """(a token's KL [T], bool [T]: past a clamp, where there is no gradient). The log-ratio is clamped to
    [-log_ratio_clamp, log_ratio_clamp] and the estimate to [-kl_clamp, kl_clamp]: unclamped, one token 40
    nats off has a gradient of 2e17 under k3 and owns the step."""
    difference = reference.detach() - logprob
    bound = objective.log_ratio_clamp
    estimate = KL_ESTIMATORS[objective.kl_estimator](difference.clamp(-bound, bound))
    past = (difference.abs() > bound) | (estimate.detach().abs() > objective.kl_clamp)
    return estimate.clamp(-objective.kl_clamp, objective.kl_clamp), past


# ----------------------------------------------------------------------------------------------- aggregations
# From the lengths of a microbatch's replies, int64 [R] and the same on the host, which of them
# count (bool [R], and on the host; None for all), and the longest reply allowed: (weight of a token of each
# reply, float32 [R]; what these replies add to the batch's denominator). A reply that does not count has
# weight 0.
Kept = tuple[Tensor, Sequence[bool]] | None


def token_mean(lengths: Tensor, on_host: Sequence[int], kept: Kept, most: int) -> tuple[Tensor, int]:
    """Every token of the batch counts the same; tokens of replies that do not count are not counted
    either."""
    if kept is None:
        return torch.ones(len(lengths), device=lengths.device), sum(on_host)
    return kept[0].float(), sum(n for n, counts in zip(on_host, kept[1], strict=True) if counts)


def sequence_mean(lengths: Tensor, on_host: Sequence[int], kept: Kept, most: int) -> tuple[Tensor, int]:
    """Every reply counts the same, as the mean of its tokens; the denominator counts all replies, as TRL's
    does."""
    weight = 1.0 / lengths.float()
    return weight if kept is None else weight * kept[0], len(on_host)


def sequence_sum(lengths: Tensor, on_host: Sequence[int], kept: Kept, most: int) -> tuple[Tensor, int]:
    """Every reply counts as the sum of its tokens over one constant, the longest reply allowed (Dr. GRPO, Liu
    et al. 2025, arXiv 2503.20783); the denominator counts all replies."""
    weight = torch.full((len(lengths),), 1.0 / most, device=lengths.device)
    return weight if kept is None else weight * kept[0], len(on_host)


AGGREGATIONS: dict[str, Callable[[Tensor, Sequence[int], Kept, int], tuple[Tensor, int]]] = {
    "token-mean": token_mean,
    "seq-mean-token-mean": sequence_mean,
    "seq-mean-token-sum-norm": sequence_sum,
}
