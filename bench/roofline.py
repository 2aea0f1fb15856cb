"""What the benchmarks of small operators share: synchronised timing, inputs past the cache, and a copy's
bandwidth in the same process."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@lru_cache(maxsize=1)
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying a tensor that no cache holds; the best of several."""
    source = torch.zeros(2**28 if DEVICE == "cuda" else 2**25, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        synchronize()
        began = time.perf_counter()
        target.copy_(source)
        synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * source.numel() / min(seconds)


def timed(benchmark: Any, way: Callable[..., Any], inputs: list[tuple], *, moved: int, rounds: int) -> None:
    """Time `way` on each of `inputs` in turn; `moved`: the bytes that one call must at least read and
    write."""
    turn = iter(range(10**9))

    def call() -> None:
        way(*inputs[next(turn) % len(inputs)])
        synchronize()

    benchmark.pedantic(call, rounds=rounds, warmup_rounds=3)
    rate = moved / benchmark.stats.stats.median
    benchmark.extra_info |= {
        "device": DEVICE,
        "GB/s": round(rate / 1e9, 3),
        "of_copy_bandwidth": round(rate / copy_bandwidth(), 4),
    }
