"""Cases of the head's kernels; test_linear_logprob.py runs them under the interpreter and on the GPU."""

from __future__ import annotations

import pytest
import torch
from locus_kernels.grpo_loss import grpo_loss
from locus_kernels.grpo_loss import op as grpo_op
from locus_kernels.grpo_loss import triton as grpo_kernels
from locus_kernels.linear_logprob import linear_logprob, op
from locus_kernels.linear_logprob import triton as kernels
from torch import Tensor

from tests.kernels.head_cases import SHAPES, assert_as_good_as_eager, head_inputs
from tests.kernels.interpreter import device, poisoned_empty
from tests.kernels.test_grpo_loss import NUMBERS, assert_grpo_as_good_as_eager

DEVICE = device()
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions on the kernels, whatever the device, with garbage in every output before it is
    written."""
    poisoned_empty(monkeypatch)
    monkeypatch.setattr(op, "backend", lambda _: kernels)
    monkeypatch.setattr(grpo_op, "backend", lambda _: grpo_kernels)


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def descriptors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of reading the matrices; those that the copy engine cannot read go by pointers either way."""
    if request.param and DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no bulk copy engine")
    plain = kernels.Head.__init__
    monkeypatch.setattr(
        kernels.Head,
        "__init__",
        lambda self, h, w, t, c, _=None, **kw: plain(self, h, w, t, c, request.param, **kw),
    )
    return request.param


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 3.0)])
def test_as_good_as_eager(shape, dtype, temperature, softcap, descriptors) -> None:
    if dtype == torch.float32 and descriptors:
        pytest.skip("float32 goes by pointers")
    assert_as_good_as_eager(linear_logprob, shape, dtype, DEVICE, temperature, softcap)


@pytest.mark.parametrize("V", [255, 256, 257, 1021])
def test_edges_of_the_tiles_in_several_chunks(V, descriptors, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "chunk_columns", lambda T, V, columns: columns)
    for T in (127, 129):
        assert_as_good_as_eager(linear_logprob, (T, 72, V), torch.float16, DEVICE)


@pytest.mark.parametrize(("V", "dtype"), [(151_669, torch.float16), (32_001, torch.float32)])
def test_real_vocabularies(V, dtype) -> None:
    """Few rows, so that there are only the vocabulary's programs; several chunks in backward."""
    assert_as_good_as_eager(linear_logprob, (3, 8, V), dtype, DEVICE, draws=1)


def test_same_bits_twice(descriptors) -> None:
    inputs = head_inputs(37, 40, 523, torch.float16, DEVICE)
    results = []
    for _ in range(2):
        hidden, weight = (t.clone().requires_grad_() for t in inputs[:2])
        logprob, entropy = linear_logprob(hidden, weight, inputs[2])
        (logprob + entropy).sum().backward()
        results.append((logprob, entropy, hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_without_gradient_are_skipped() -> None:
    """A tile of 64 rows without gradient is not computed: NaN in its hidden states does not reach the
    gradient of the others."""
    hidden, weight, ids = head_inputs(128, 40, 131, torch.float32, DEVICE)
    hidden = hidden.clone()
    hidden[64:] = 0
    clean = hidden.clone().requires_grad_()
    linear_logprob(clean, weight, ids)[0][:64].sum().backward()
    lse = torch.zeros(128, device=DEVICE)
    hidden[64:] = torch.nan
    lse, entropy = kernels.forward(hidden, weight, ids, 1.0, None)[2], lse
    g = (torch.arange(128, device=DEVICE) < 64).float()
    grad, _ = kernels.backward(g, None, hidden, weight, ids, lse, entropy, 1.0, None, True, False)
    assert clean.grad is not None
    torch.testing.assert_close(grad, clean.grad)


@pytest.mark.parametrize("bad", [-1, 523, -100, 2**40])
def test_ids_outside_the_vocabulary(bad) -> None:
    hidden, weight, ids = head_inputs(37, 40, 523, torch.float32, DEVICE)
    ids[5] = bad
    hidden = hidden.clone().requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, ids)
    assert logprob.isnan().sum() == 1
    assert logprob[5].isnan()
    assert entropy.isfinite().all()
    logprob.sum().backward()


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


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("T", [0, 1, 37, 150])
def test_grpo_agrees_with_the_reference(T, optional, dtype, monkeypatch) -> None:
    hidden, weight, ids = head_inputs(T, 40, 131, dtype, DEVICE)
    draws = torch.randn(4, T, generator=torch.Generator().manual_seed(T)).to(DEVICE)
    start = linear_logprob(hidden, weight, ids)[0]
    given = [start + 0.4 * draws[1], start + 0.5 * draws[2], draws[3].abs()]
    vectors: list[Tensor | None] = [draws[0], *(given if optional else [None] * 3)]
    results = []
    for reference in (False, True):
        if reference:
            monkeypatch.undo()
            hidden, weight, ids = (t.cpu() for t in (hidden.float(), weight.float(), ids))
            vectors = [t if t is None else t.cpu() for t in vectors]
        leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
        loss, logprob, metrics = grpo_loss(*leaves, ids, *vectors, **NUMBERS)
        (loss + 0.1 * logprob.sum()).backward()
        results.append(
            [
                t.detach().double().cpu()
                for t in (loss, logprob, *metrics.values(), *(leaf.grad for leaf in leaves))
            ]
        )
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
