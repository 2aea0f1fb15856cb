"""The GRPO loss: launches, what else is asked of the device, and the largest tensor, at full size. Nothing is
computed, and tensors have shapes alone."""

from __future__ import annotations

import pytest
from locus_kernels.grpo_loss import reference
from locus_kernels.grpo_loss.reference import Numbers, Tokens
from locus_kernels.linear_logprob import reference as head_reference
from locus_kernels.linear_logprob.records import Scale, Slope, Wanted

from tests.kernels.linear_logprob.cases import FULL, full_size
from tests.kernels.probes import WAITING, Allocations, Operations

T, D, V = FULL
NUMBERS, SCALE = Numbers(0.2, 0.2, 0.1, 20.0, 10.0), Scale(1.0, None)


def test_launches(launches: list[str]) -> None:
    grpo = pytest.importorskip("locus_kernels.grpo_loss.triton")
    head = pytest.importorskip("locus_kernels.linear_logprob.triton")
    matrices, vector, saved = full_size()
    with Operations() as done, Allocations(spared=(V, D)) as seen:
        grpo.forward(*matrices, Tokens(*[vector] * 4), NUMBERS, SCALE)
        assert launches == ["partial_kernel", "objective_kernel", "sum_kernel"]
        head.backward(Slope(vector, None), *matrices, saved, SCALE, Wanted(True, True))
    assert 0 < seen.largest < T * V // 8
    assert not set(done.names) & set(WAITING)


def test_the_cpu_path_has_no_large_tensor() -> None:
    matrices, vector, saved = full_size()
    with Allocations(spared=(V, D)) as seen:
        reference.forward(*matrices, Tokens(*[vector] * 4), NUMBERS, SCALE)
        head_reference.backward(Slope(vector, None), *matrices, saved, SCALE, Wanted(True, True))
    assert 0 < seen.largest < T * V // 8
