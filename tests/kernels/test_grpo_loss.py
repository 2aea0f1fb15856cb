"""The fused GRPO loss against float64 truth and the trainer's objective. Its kernels: interpret_head.py; Liger and TRL: test_grpo_loss_peers.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from locus_kernels.grpo_loss import grpo_loss
from locus_kernels.linear_logprob.reference import dense
from torch import Tensor

from tests.kernels.head_cases import assert_errors, head_inputs
from tests.objective import grpo_loss as trainers_loss

NUMBERS = {"clip_low": 0.2, "clip_high": 0.28, "kl_coefficient": 0.05, "log_ratio_clamp": 0.9, "kl_clamp": 0.5}


def case(
    T: int, D: int, V: int, dtype: torch.dtype = torch.float32, optional: bool = True, seed: int = 0, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor | None]]:
    """([hidden, weight, ids], [advantages, old, reference, token weight]): ratios on both sides of both bounds, zero advantages and zero weights."""
    hidden, weight, ids = head_inputs(T, D, V, dtype, device, seed)
    draw = torch.randn(4, T, generator=torch.Generator().manual_seed(T + D + V + 1000 * seed)).to(device)
    logprob = dense(hidden.float(), weight.float(), ids)[0]
    keep = (torch.arange(T, device=device) % 5 != 4).float()
    advantages, share = draw[0] * keep, draw[3].abs() * keep.flip(0)
    return [hidden, weight, ids], [advantages, *([logprob + 0.4 * draw[1], logprob + 0.5 * draw[2], share] if optional else [None, None, None])]


def by_trainer(
    hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor, old, reference, share, *, temperature: float = 1.0, softcap=None, **numbers
):
    """The same through the trainer's pure objective on dense log-probs; in the dtype of the arguments."""
    logprob, entropy = dense(hidden, weight, ids, temperature, softcap)
    old = logprob.detach() if old is None else old
    share = torch.ones_like(logprob) if share is None else share
    loss, metrics = trainers_loss(logprob, old=old, reference=reference, advantage=advantages, weight=share, **numbers)
    return loss, logprob, metrics | {"entropy": entropy.detach().sum()}


def results(function, head: list[Tensor], vectors: list[Tensor | None], **numbers) -> tuple[list[Tensor], dict[str, Tensor]]:
    """([loss, log-prob, d/d hidden, d/d weight], metrics) in float64."""
    leaves = [t.detach().requires_grad_() for t in head[:2]]
    loss, logprob, metrics = function(*leaves, head[2], *vectors, **NUMBERS | numbers)
    (3 * loss).backward()
    return [t.detach().double() for t in (loss, logprob, *(leaf.grad for leaf in leaves))], {k: v.double() for k, v in metrics.items()}


@pytest.mark.parametrize("shape", [(0, 5, 7), (1, 1, 7), (37, 40, 523), (131, 24, 257)], ids=str)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_trainers_objective(shape, optional, dtype) -> None:
    head, vectors = case(*shape, torch.float32, optional)
    head, vectors = [head[0].to(dtype), head[1].to(dtype), head[2]], [t if t is None else t.to(dtype) for t in vectors]
    extra = {"temperature": 0.8, "softcap": 4.0} if optional else {}
    ours, metrics = results(grpo_loss, head, vectors, **extra)
    theirs, expected = results(by_trainer, head, vectors, **extra)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert set(metrics) == {*expected, "ratio_min"}
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-5, atol=1e-5)
    if shape[0] > 100 and optional:
        assert metrics["clip_low"] > 3
        assert metrics["clip_high"] > 3
        assert metrics["ratio_min"] < 0.8 < 1.28 < metrics["ratio_max"]
        assert 0 < metrics["ratio_clamped"] < metrics["kl_clamped"] < shape[0] / 2


@settings(derandomize=True, max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(2, 200), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.booleans())
def test_as_good_as_eager(T, D, V, dtype, optional) -> None:
    assert_grpo_as_good_as_eager(T, D, V, dtype, optional, draws=6)


def assert_grpo_as_good_as_eager(T: int, D: int, V: int, dtype: torch.dtype, optional: bool, draws: int, device: str = "cpu") -> None:
    """Loss, log-prob and both gradients against the trainer's objective on dense log-probs; see `assert_errors`."""

    def draw(seed: int) -> list[list[Tensor]]:
        head, vectors = case(T, D, V, dtype, optional, seed, device)
        exact = [head[0].double(), head[1].double(), head[2]], [t if t is None else t.double() for t in vectors]
        return [results(grpo_loss, head, vectors)[0], results(by_trainer, head, vectors)[0], results(by_trainer, *exact)[0]]

    assert_errors(draw, draws)


@pytest.mark.parametrize("V", [32_001, 151_669, 151_936])
def test_real_vocabularies(V) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_grpo_as_good_as_eager(5, 8, V, dtype, optional=True, draws=3)


def test_gradcheck() -> None:
    head, vectors = case(6, 3, 11)
    leaves = [t.double().clone().requires_grad_() for t in head[:2]]
    vectors = [t if t is None else t.double() for t in vectors]
    assert torch.autograd.gradcheck(lambda h, w: grpo_loss(h, w, head[2], *vectors, **NUMBERS, temperature=0.7)[:2], leaves)


def test_same_bits_twice_and_compiled() -> None:
    head, vectors = case(37, 40, 523)
    first, _ = results(grpo_loss, head, vectors)
    second, _ = results(grpo_loss, head, vectors)
    compiled, _ = results(torch.compile(grpo_loss, backend="aot_eager", fullgraph=True), head, vectors)
    for a, b, c in zip(first, second, compiled, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": None}, "advantages"),
        ({"advantages": torch.zeros(2)}, "advantages"),
        ({"old_logprob": torch.zeros(3, dtype=torch.int64)}, "old_logprob"),
        ({"reference_logprob": torch.zeros(3, 1)}, "reference_logprob"),
        ({"token_weight": torch.zeros(3, device="meta")}, "token_weight"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"kl_coefficient": float("inf")}, "kl_coefficient"),
        ({"log_ratio_clamp": 0.0}, "log_ratio_clamp above 0, or infinite"),
        ({"kl_clamp": float("nan")}, "kl_clamp above 0, or infinite"),
        ({"temperature": -1.0}, "temperature"),
        ({"ids": torch.tensor([0, 1, 31]), "validate": True}, r"ids in \[0, 31\)"),
    ],
)
def test_bad_input(change, message) -> None:
    head, vectors = case(3, 16, 31)
    arguments = dict(zip(("hidden", "weight", "ids", "advantages"), [*head, vectors[0]], strict=True))
    with pytest.raises(ValueError, match=message):
        grpo_loss(**arguments | NUMBERS | change)
