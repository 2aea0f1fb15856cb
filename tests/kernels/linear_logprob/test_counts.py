"""The head: launches, what else is asked of the device, and the largest tensor, at full size. Nothing is
computed, and tensors have shapes alone."""

from __future__ import annotations

import pytest
from locus_kernels.linear_logprob.records import Scale, Slope, Wanted

from tests.kernels.linear_logprob.cases import FULL, full_size
from tests.kernels.probes import WAITING, Allocations, Operations

triton = pytest.importorskip("triton")
from locus_kernels.linear_logprob import triton as head  # noqa: E402
from locus_kernels.linear_logprob.triton_backward import chunk_columns  # noqa: E402

T, D, V = FULL
SCALE = Scale(1.0, None)


def test_launches(launches: list[str]) -> None:
    matrices, vector, saved = full_size()
    with Operations() as done, Allocations(spared=(V, D)) as seen:
        head.forward(*matrices, SCALE)
        assert launches == ["partial_kernel", "finish_kernel"]
        launches.clear()
        head.backward(Slope(vector, vector), *matrices, saved, SCALE, Wanted(True, True))
    chunks = triton.cdiv(V, chunk_columns(T, V, 128))
    assert launches == ["logit_gradient_kernel"] * chunks
    assert chunks <= 19
    assert 0 < seen.largest < T * V // 8
    assert not set(done.names) & set(WAITING)


def test_frozen_weight_costs_one_product_a_chunk(launches: list[str]) -> None:
    matrices, vector, saved = full_size()
    counts = []
    for wanted in (Wanted(True, True), Wanted(True, False)):
        with Operations() as done, Allocations() as seen:
            head.backward(Slope(vector, None), *matrices, saved, SCALE, wanted)
        counts.append(sum(name in ("mm", "bmm", "addmm") for name in done.names))
    assert counts[0] == 2 * counts[1] > 0
    assert seen.largest < T * V // 8  # [V, D] is not among the tensors
