"""Inputs of the GRPO loss, and the trainer's objective on dense log-probs as its truth. Legend: T tokens, V
vocabulary, D hidden size."""

from __future__ import annotations

import math

import torch
from locus_kernels.grpo_loss import grpo_loss
from locus_kernels.linear_logprob.reference import dense
from torch import Tensor

from locus_fast.step.losses import LossInputs, Objective
from tests.kernels.linear_logprob.cases import assert_errors, head_inputs

NUMBERS = {
    "clip_low": 0.2,
    "clip_high": 0.28,
    "kl_coefficient": 0.05,
    "log_ratio_clamp": 0.9,
    "kl_clamp": 0.5,
}


def case(
    T: int,
    D: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    optional: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[list[Tensor], list[Tensor | None]]:
    """([hidden, weight, ids], [advantages, old, reference, token weight]): ratios on both sides of both
    bounds, zero advantages and zero weights."""
    hidden, weight, ids = head_inputs(T, D, V, dtype, device, seed)
    draw = torch.randn(4, T, generator=torch.Generator().manual_seed(T + D + V + 1000 * seed)).to(device)
    logprob = dense(hidden.float(), weight.float(), ids)[0]
    keep = (torch.arange(T, device=device) % 5 != 4).float()
    advantages, share = draw[0] * keep, draw[3].abs() * keep.flip(0)
    return [hidden, weight, ids], [
        advantages,
        *([logprob + 0.4 * draw[1], logprob + 0.5 * draw[2], share] if optional else [None, None, None]),
    ]


def by_trainer(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    advantages: Tensor,
    old: Tensor | None,
    reference: Tensor | None,
    share: Tensor | None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    **numbers: float,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same through the trainer's pure objective on dense log-probs; in the dtype of the arguments."""
    logprob, entropy = dense(hidden, weight, ids, temperature, softcap)
    old = logprob.detach() if old is None else old
    share = torch.ones_like(logprob) if share is None else share
    no_rows = torch.zeros_like(ids)  # only losses of whole replies ask for them
    inputs = LossInputs(logprob, old, reference, advantages, share, no_rows, no_rows[:1], entropy)
    kl_coef = numbers.pop("kl_coefficient")
    off = {"delta": math.inf, "entropy_coef": 0.0}
    objective = Objective(loss="grpo", kl_estimator="k3", kl_coef=kl_coef, **off, **numbers)
    loss, metrics = objective(inputs)
    return loss, logprob, metrics | {"entropy": entropy.detach().sum()}


def results(
    function, head: list[Tensor], vectors: list[Tensor | None], **numbers
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """([loss, log-prob, d/d hidden, d/d weight], metrics) in float64."""
    leaves = [t.detach().requires_grad_() for t in head[:2]]
    loss, logprob, metrics = function(*leaves, head[2], *vectors, **NUMBERS | numbers)
    (3 * loss).backward()
    return [t.detach().double() for t in (loss, logprob, *(leaf.grad for leaf in leaves))], {
        k: v.double() for k, v in metrics.items()
    }


def assert_grpo_as_good_as_eager(
    T: int, D: int, V: int, dtype: torch.dtype, optional: bool, draws: int, device: str = "cpu"
) -> None:
    """Loss, log-prob and both gradients against the trainer's objective on dense log-probs; see
    `assert_errors`."""

    def draw(seed: int) -> list[list[Tensor]]:
        head, vectors = case(T, D, V, dtype, optional, seed, device)
        exact = (
            [head[0].double(), head[1].double(), head[2]],
            [t if t is None else t.double() for t in vectors],
        )
        return [
            results(grpo_loss, head, vectors)[0],
            results(by_trainer, head, vectors)[0],
            results(by_trainer, *exact)[0],
        ]

    assert_errors(draw, draws)
