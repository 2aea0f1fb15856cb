"""Cases of the GRPO loss's kernels; test_grpo_loss.py runs them under the interpreter and on the GPU."""

from __future__ import annotations

import pytest
import torch
from locus_kernels import dispatch
from locus_kernels.grpo_loss import grpo_loss
from locus_kernels.linear_logprob import linear_logprob
from torch import Tensor

from tests.kernels.grpo_loss.cases import NUMBERS, assert_grpo_as_good_as_eager, by_trainer
from tests.kernels.interpreter import device, poisoned_empty
from tests.kernels.linear_logprob.cases import assert_errors, head_inputs

DEVICE = device()
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions on the kernels, whatever the device, with garbage in every output before it is
    written."""
    poisoned_empty(monkeypatch)
    monkeypatch.setattr(dispatch, "on_kernels", lambda tensor: True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("shape", [(5, 24, 7), (37, 40, 131)], ids=str)
def test_grpo_as_good_as_eager(shape, optional, dtype) -> None:
    assert_grpo_as_good_as_eager(*shape, dtype, optional, draws=4, device=DEVICE)


@pytest.mark.parametrize("bad", [-1, 523, -100, 2**40])
def test_ids_outside_the_vocabulary_in_the_loss(bad) -> None:
    """NaN in the loss and in that token's log-prob, nowhere else, and nothing is read outside."""
    hidden, weight, ids = head_inputs(37, 40, 523, torch.float32, DEVICE)
    ids[5] = bad
    hidden = hidden.clone().requires_grad_()
    advantages, old = torch.ones(37, device=DEVICE), torch.zeros(37, device=DEVICE)
    loss, logprob, metrics = grpo_loss(hidden, weight, ids, advantages, old, old, **NUMBERS)
    loss.backward()
    assert loss.isnan()
    assert (logprob.isnan() == (torch.arange(37, device=DEVICE) == 5)).all()
    assert metrics["entropy"].isfinite()
    assert hidden.grad is not None
    assert hidden.grad[torch.arange(37) != 5].isfinite().all()


def outcome(function, head: list[Tensor], vectors: list[Tensor | None]) -> list[Tensor]:
    """[loss, log-prob, metrics by name, d/d hidden, d/d weight] in float64, on the CPU; the loss and the
    log-probs both have a gradient. The smallest ratio is left out: the trainer's objective has no such
    metric."""
    leaves = [t.detach().clone().requires_grad_() for t in head[:2]]
    loss, logprob, metrics = function(*leaves, head[2], *vectors, **NUMBERS)
    (loss + 0.1 * logprob.sum()).backward()
    told = [metrics[name] for name in sorted(metrics) if name != "ratio_min"]
    return [t.detach().double().cpu() for t in (loss, logprob, *told, *(leaf.grad for leaf in leaves))]


def near_inputs(
    T: int, dtype: torch.dtype, optional: bool, seed: int = 0
) -> tuple[list[Tensor], list[Tensor | None]]:
    """([hidden, weight, ids], [advantages, old, reference, token weight]) whose ratios lie on both sides of
    both bounds."""
    head = list(head_inputs(T, 40, 131, dtype, DEVICE, seed))
    draws = torch.randn(4, T, generator=torch.Generator().manual_seed(T + 1000 * seed)).to(DEVICE)
    start = linear_logprob(*head)[0]
    given = [start + 0.4 * draws[1], start + 0.5 * draws[2], draws[3].abs()]
    return head, [draws[0], *(given if optional else [None] * 3)]


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("T", [0, 1, 37, 150])
def test_float32_agrees_with_the_reference(T, optional, monkeypatch) -> None:
    head, vectors = near_inputs(T, torch.float32, optional)
    ours = outcome(grpo_loss, head, vectors)
    monkeypatch.undo()
    theirs = outcome(grpo_loss, [t.cpu() for t in head], [t if t is None else t.cpu() for t in vectors])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("T", [0, 1, 37, 150])
def test_half_types_err_no_more_than_eager(T, optional, dtype) -> None:
    """Loss, log-probs, metrics and gradients: judged by the trainer's objective on dense log-probs of that
    dtype, whose own errors grow with T, and by its float64 truth."""

    def draw(seed: int) -> list[list[Tensor]]:
        head, vectors = near_inputs(T, dtype, optional, seed)
        exact = [head[0].double(), head[1].double(), head[2]]
        wide = [t if t is None else t.double() for t in vectors]
        sides = (grpo_loss, head, vectors), (by_trainer, head, vectors), (by_trainer, exact, wide)
        return [outcome(*side) for side in sides]

    assert_errors(draw, draws=4)
