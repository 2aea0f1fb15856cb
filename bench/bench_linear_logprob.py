"""Log-prob and entropy of tokens from hidden states: eager, torch.compile, and ours (on a machine without
CUDA: our CPU path).

Liger's fused linear cross-entropy stands beside them where there is a GPU, its kernels being Triton's: the
log-prob alone, it has no entropy.
"""

from __future__ import annotations

import pytest
import torch
from locus_kernels.linear_logprob import linear_logprob
from locus_kernels.linear_logprob.reference import dense

from bench.head_case import CASES, CUDA, TOLERANCE, head_sets, measure


def liger(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor]:
    """Without gradients wanted: it would compute them in forward."""
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    if not CUDA:
        pytest.skip("Liger's kernels need a GPU")
    return (
        -functional.liger_fused_linear_cross_entropy(hidden.detach(), weight.detach(), ids, reduction="none"),
    )


WAYS = {
    "eager": dense,
    "compile": torch.compile(dense, dynamic=False),
    "liger": liger,
    "locus_kernels": linear_logprob,
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def task(request):
    return request.param, head_sets(*request.param)


@pytest.mark.parametrize("way", WAYS)
def test_forward(benchmark, task, way) -> None:
    case, sets = task
    with torch.no_grad():
        for inputs in sets:
            for got, true in zip(WAYS[way](*inputs), linear_truth(*inputs), strict=False):
                torch.testing.assert_close(
                    got.float(), true, rtol=TOLERANCE[case[3]], atol=TOLERANCE[case[3]]
                )
        benchmark.group = f"linear_logprob forward, (T, D, V, dtype) = {case}"
        measure(benchmark, WAYS[way], sets, case, passes=1)


def linear_truth(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
    """Exact in float32 products, a few rows at a time."""
    parts = [
        dense(hidden[rows].float(), weight.float(), ids[rows])
        for rows in torch.arange(len(ids), device=ids.device).split(256)
    ]
    return [torch.cat(part) for part in zip(*parts, strict=True)]
