"""GRPO loss, forward and backward, from hidden states: eager, torch.compile, Liger's fused linear loss, and
ours (without CUDA: our CPU path).

All four compute the mean over B * L tokens with the clip and the KL term on, and gradients of hidden states
and weight.
"""

from __future__ import annotations

import functools

import pytest
import torch
from locus_kernels.grpo_loss import grpo_loss
from locus_kernels.linear_logprob.reference import dense
from torch import Tensor

from bench.head_case import CASES, CUDA, TOLERANCE, head_sets, measure
from tests.objective import grpo_loss as plain_objective

L = 32  # tokens of a reply
NUMBERS = {"clip_low": 0.2, "clip_high": 0.28, "kl_coefficient": 0.04}


def plain_loss(
    hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor, old: Tensor, reference: Tensor
) -> Tensor:
    logprob, _ = dense(hidden, weight, ids)
    share = torch.ones_like(logprob)
    return plain_objective(
        logprob, old=old, reference=reference, advantage=advantages, weight=share, **NUMBERS
    )[0] / len(ids)


def our_loss(
    hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor, old: Tensor, reference: Tensor
) -> Tensor:
    return grpo_loss(hidden, weight, ids, advantages, old, reference, **NUMBERS)[0] / len(ids)


@functools.cache
def liger():
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    return chunked.LigerFusedLinearGRPOLoss(
        beta=0.04, epsilon_low=0.2, epsilon_high=0.28, loss_type="bnpo", compiled=CUDA
    )


def liger_loss(
    hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor, old: Tensor, reference: Tensor
) -> Tensor:
    mask = torch.ones(len(ids) // L, L, device=ids.device)
    states, tokens, vectors = (
        hidden.view(-1, L, hidden.shape[1]),
        ids.view(-1, L),
        [t.view(-1, L) for t in (reference, old)],
    )
    return liger()(
        states,
        weight,
        tokens,
        mask,
        advantages[::L],
        ref_per_token_logps=vectors[0],
        old_per_token_logps=vectors[1],
    )[0]


WAYS = {
    "eager": plain_loss,
    "compile": torch.compile(plain_loss, dynamic=False),
    "liger": liger_loss,
    "locus_kernels": our_loss,
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def task(request):
    sets = []
    for hidden, weight, ids in head_sets(*request.param):
        with torch.no_grad():
            logprob = dense(hidden, weight, ids)[0]
        advantages = torch.randn(len(ids) // L, device=ids.device).repeat_interleave(L)
        # log ratios that no rounding of a log-prob carries over a clip bound
        away = logprob.new_tensor([-0.6, -0.05, 0.05, 0.6])
        old = logprob - away[torch.randint(0, 4, ids.shape, device=ids.device)]
        sets.append((hidden, weight, ids, advantages, old, logprob + 0.2 * torch.randn_like(logprob)))
    return request.param, sets


def gradients(way, *inputs: Tensor) -> list[Tensor]:
    """[loss, d/d hidden, d/d weight]."""
    loss = way(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs[:2])]


@pytest.mark.parametrize("way", WAYS)
def test_forward_backward(benchmark, task, way) -> None:
    case, sets = task
    run = functools.partial(gradients, WAYS[way])
    for inputs in sets:
        single = [t.detach().float().requires_grad_() for t in inputs[:2]]
        for got, true in zip(run(*inputs), gradients(plain_loss, *single, *inputs[2:]), strict=True):
            assert (got - true).norm() <= TOLERANCE[case[3]] * true.norm()
    benchmark.group = f"grpo_loss forward and backward, (T, D, V, dtype) = {case}"
    measure(benchmark, run, sets, case, passes=3)
