"""The head's log-prob and entropy on the CPU path against float64 truth, its registration, its memory; the
kernels under the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from locus_kernels.linear_logprob import linear_logprob, reference
from locus_kernels.linear_logprob.records import Saved, Scale, Slope, Wanted

from tests.kernels.interpreter import WAYS, run_cases
from tests.kernels.linear_logprob.cases import SHAPES, assert_as_good_as_eager, head_inputs, recomputed
from tests.kernels.probes import Allocations

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 3.0)])
def test_as_good_as_eager(shape, dtype, temperature, softcap) -> None:
    assert_as_good_as_eager(linear_logprob, shape, dtype, "cpu", temperature, softcap)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(0, 33),
    st.integers(2, 400),
    st.sampled_from(FLOATS),
    st.sampled_from([1.0, 0.3, 2.5]),
    st.integers(1, 4000),
)
def test_property(T, D, V, dtype, temperature, chunk) -> None:
    """From two ids on: with one, eager's gradient is 0 to the bit. With few, or at a low temperature, a
    probability comes so near 1 that eager's is almost so as well, and that of recomputed logits can only come
    near it: hence `recomputed`. The fixed shapes of the other tests do without."""
    before = reference.CHUNK_ELEMENTS
    try:
        reference.CHUNK_ELEMENTS = chunk
        slack = 1e-6 + recomputed((T, D, V), dtype, temperature)
        assert_as_good_as_eager(linear_logprob, (T, D, V), dtype, "cpu", temperature, slack=slack)
    finally:
        reference.CHUNK_ELEMENTS = before


@pytest.mark.parametrize("V", [32_001, 151_669, 151_936])
@pytest.mark.parametrize("chunk", [reference.CHUNK_ELEMENTS, 2**15])
def test_real_vocabularies(V, chunk, monkeypatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk)
    for dtype in FLOATS:
        assert_as_good_as_eager(linear_logprob, (5, 8, V), dtype, "cpu", 0.9)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap, monkeypatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1)  # chunks of 128 columns
    hidden, weight, ids = head_inputs(3, 2, 131, torch.float64)
    inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_(), ids
    assert torch.autograd.gradcheck(lambda *a: linear_logprob(*a, 0.8, softcap), inputs)


def test_same_bits_twice_and_transposed_inputs() -> None:
    hidden, weight, ids = head_inputs(37, 40, 523, torch.float32)
    first, second = linear_logprob(hidden, weight, ids), linear_logprob(hidden, weight, ids)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    turned = linear_logprob(hidden.T.contiguous().T, weight.T.contiguous().T, ids.int())
    torch.testing.assert_close(turned, first)


def test_frozen_weight_gets_no_gradient(monkeypatch) -> None:
    seen = []
    plain = reference.backward
    monkeypatch.setattr(reference, "backward", lambda *a: seen.append(a[-1]) or plain(*a))
    hidden, weight, ids = head_inputs(3, 16, 31, torch.float32)
    linear_logprob(hidden.requires_grad_(), weight, ids)[0].sum().backward()
    assert seen == [(True, False)]
    assert weight.grad is None


def test_survives_compile() -> None:
    hidden, weight, ids = head_inputs(3, 16, 31, torch.float32)
    compiled = torch.compile(
        lambda h: linear_logprob(h * 2, weight, ids, 0.9)[0].sum(), backend="aot_eager", fullgraph=True
    )
    grads = []
    for function in (compiled, lambda h: linear_logprob(h * 2, weight, ids, 0.9)[0].sum()):
        leaf = hidden.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_no_large_tensor() -> None:
    """The reference's forward and backward at full size, on shapes alone."""
    T, D, V = 2048, 2048, 151_936
    vector = torch.empty(T, device="meta")
    hidden, weight, ids = (
        vector.new_empty(T, D),
        vector.new_empty(V, D),
        torch.empty(T, dtype=torch.int64, device="meta"),
    )
    with Allocations(spared=(V, D)) as seen:
        reference.forward(hidden, weight, ids, Scale(1.0, None))
        matrices, saved = (hidden, weight, ids), Saved(vector, vector)
        reference.backward(Slope(vector, vector), *matrices, saved, Scale(1.0, 30.0), Wanted(True, True))
    assert 0 < seen.largest < T * V // 8


def test_id_outside_the_vocabulary() -> None:
    hidden, weight, ids = head_inputs(3, 16, 31, torch.float32)
    ids[1] = 31
    assert linear_logprob(hidden, weight, ids)[0].isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"ids in \[0, 31\)"):
        linear_logprob(hidden, weight, ids, validate=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 15)}, "hidden"),
        ({"hidden": torch.zeros(3, 16, dtype=torch.int64)}, "one dtype"),
        ({"weight": torch.zeros(31, 16, dtype=torch.float16)}, "one dtype"),
        ({"weight": torch.zeros(0, 16)}, "at least one"),
        ({"weight": torch.zeros(31, 16, device="meta")}, "one device"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, "ids"),
        ({"ids": torch.zeros(3)}, "integer ids"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"softcap": -1.0}, "softcap"),
    ],
)
def test_bad_input(change, message) -> None:
    hidden, weight, ids = head_inputs(3, 16, 31, torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{"hidden": hidden, "weight": weight, "ids": ids} | change)


@pytest.mark.parametrize("interpret", WAYS)
def test_kernels(interpret: bool, subtests: pytest.Subtests) -> None:
    run_cases("linear_logprob/interpret.py", interpret, subtests=subtests)
