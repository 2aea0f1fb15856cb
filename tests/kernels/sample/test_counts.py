"""Sampling: launches, what else is asked of the device, and the largest tensor, at full size. Nothing is
computed, and tensors have shapes alone."""

from __future__ import annotations

import pytest
import torch
from locus_kernels.sample.reference import Distribution, Place

from tests.kernels.probes import WAITING, Allocations, Operations


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [(1.0, 0, 1.0, 2), (0.0, 0, 1.0, 2), (1.0, 50, 1.0, 3), (1.0, 50, 0.9, 3)],
)
def test_launches(launches: list[str], temperature: float, top_k: int, top_p: float, expected: int) -> None:
    kernels = pytest.importorskip("locus_kernels.sample.triton")
    rows, V = 256, 151_936
    logits = torch.empty(rows, V, device="meta", dtype=torch.bfloat16)
    row = torch.empty(rows, device="meta", dtype=torch.int64)
    allowed = torch.empty(V, device="meta").bool()
    with Operations() as done, Allocations() as seen:
        kernels.sample(logits, Place(0, row, row), Distribution(temperature, top_p, top_k, allowed))
    assert len(launches) == expected
    assert not set(done.names) & set(WAITING)
    assert 0 < seen.largest < rows * V // 200
