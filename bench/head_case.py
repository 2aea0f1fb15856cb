"""What the two benchmarks of the head share: sizes, rotating inputs, timing with synchronisation, and the
rate of a plain matrix product.

Legend: T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF, SINGLE = torch.bfloat16, torch.float32
# (T, D, V, dtype)
CASES = (
    [(2048, 2048, 151_936, HALF), (2048, 3584, 151_936, HALF)]
    if CUDA
    else [(64, 64, 2003, SINGLE), (64, 64, 2003, HALF)]
)
TOLERANCE = {SINGLE: 1e-4, HALF: 5e-2}  # of a result against float32 products, beyond which it is not timed
ROTATION = 3  # input sets; one weight alone is many times a cache


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def head_sets(T: int, D: int, V: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`ROTATION` sets of (hidden [T, D], weight [V, D], ids [T]); both matrices want gradients."""
    sets = []
    for seed in range(ROTATION):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        hidden = torch.randn(T, D, generator=generator, device=DEVICE).to(dtype)
        weight = (torch.randn(V, D, generator=generator, device=DEVICE) / D**0.5).to(dtype)
        ids = torch.randint(0, V, (T,), generator=generator, device=DEVICE)
        sets.append((hidden.requires_grad_(), weight.requires_grad_(), ids))
    return sets


def matmul_rate(T: int, D: int, V: int, dtype: torch.dtype) -> float:
    """FLOP/s of the library's hidden @ weight.T at this size, the roofline: the best of six, in this
    process."""
    hidden, weight = (
        torch.randn(T, D, device=DEVICE, dtype=dtype),
        torch.randn(V, D, device=DEVICE, dtype=dtype),
    )
    best = float("inf")
    for _ in range(6):
        synchronize()
        start = time.perf_counter()
        hidden @ weight.T
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * T * D * V / best


def measure(
    benchmark: Any,
    run: Callable[..., Any],
    sets: list[Any],
    case: tuple[int, int, int, torch.dtype],
    passes: int,
) -> None:
    """Time `run` over the rotated sets, each timing synchronised. extra_info: TFLOP/s counted over the
    floor's `passes` of 2 T D V operations, the fraction of the matrix product's rate, and on CUDA the peak
    memory above the inputs in MiB."""
    T, D, V, dtype = case
    turn = iter(range(1 << 60))

    def once() -> None:
        run(*sets[next(turn) % len(sets)])
        synchronize()

    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        benchmark.extra_info["peak_MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    benchmark.pedantic(once, rounds=20 if CUDA else 5, warmup_rounds=3, iterations=1)
    roofline = matmul_rate(T, D, V, dtype)
    rate = passes * 2 * T * D * V / benchmark.stats.stats.median
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if CUDA else "cpu",
        tflops=rate / 1e12,
        fraction_of_matmul=rate / roofline,
    )
