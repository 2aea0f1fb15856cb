"""Cases of the head's kernels; test_linear_logprob.py runs them under the interpreter and on the GPU."""

from __future__ import annotations

import pytest
import torch
from locus_kernels import dispatch
from locus_kernels.linear_logprob import linear_logprob, triton_backward
from locus_kernels.linear_logprob import triton as kernels
from locus_kernels.linear_logprob.records import Saved, Scale, Slope, Wanted
from locus_kernels.linear_logprob.triton_head import Head

from tests.kernels.interpreter import device, poisoned_empty
from tests.kernels.linear_logprob.cases import SHAPES, assert_as_good_as_eager, head_inputs

DEVICE = device()
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions on the kernels, whatever the device, with garbage in every output before it is
    written."""
    poisoned_empty(monkeypatch)
    monkeypatch.setattr(dispatch, "on_kernels", lambda tensor: True)


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def descriptors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of reading the matrices; those that the copy engine cannot read go by pointers either way."""
    if request.param and DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no bulk copy engine")
    plain = Head.__init__
    monkeypatch.setattr(
        Head, "__init__", lambda self, h, w, scale, _, **more: plain(self, h, w, scale, request.param, **more)
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
    monkeypatch.setattr(triton_backward, "chunk_columns", lambda T, V, columns: columns)
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
    hidden[64:] = torch.nan
    scale = Scale(1.0, None)
    saved = Saved(kernels.forward(hidden, weight, ids, scale)[2], torch.zeros(128, device=DEVICE))
    slope = Slope((torch.arange(128, device=DEVICE) < 64).float(), None)
    grad, _ = kernels.backward(slope, hidden, weight, ids, saved, scale, Wanted(True, False))
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
