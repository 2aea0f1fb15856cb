"""Log-prob and entropy of tokens from hidden states: eager, torch.compile, and ours (on a machine without CUDA: our CPU path)."""

from __future__ import annotations

import pytest
import torch
from locus_kernels.linear_logprob import linear_logprob
from locus_kernels.linear_logprob.reference import dense

from bench.head_case import CUDA, SIZES, head_sets, measure

WAYS = {"eager": dense, "compile": torch.compile(dense, dynamic=False), "locus_kernels": linear_logprob}


@pytest.fixture(scope="module", params=SIZES, ids=str)
def task(request):
    return request.param, head_sets(*request.param)


@pytest.mark.parametrize("way", WAYS)
def test_forward(benchmark, task, way) -> None:
    size, sets = task
    with torch.no_grad():
        for ours, true in zip(WAYS[way](*sets[0]), linear_truth(*sets[0]), strict=True):
            torch.testing.assert_close(ours, true, rtol=2e-2 if CUDA else 1e-4, atol=5e-2 if CUDA else 1e-4)
        benchmark.group = f"linear_logprob forward, (T, D, V) = {size}"
        measure(benchmark, WAYS[way], sets, size, passes=1)


def linear_truth(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
    """Exact in float32 products, a few rows at a time."""
    parts = [dense(hidden[rows].float(), weight.float(), ids[rows]) for rows in torch.arange(len(ids), device=ids.device).split(256)]
    return [torch.cat(part) for part in zip(*parts, strict=True)]
