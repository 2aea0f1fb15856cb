"""liger-kernel without a GPU: all that it does but its kernels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch


def leave_kernels_out(monkeypatch: pytest.MonkeyPatch, with_values: bool = False) -> Counter[str]:
    """From here on kernels do nothing but are counted, by name. with_values: what they would have written is
    zero."""
    triton = pytest.importorskip("triton")
    pytest.importorskip("liger_kernel.transformers.functional")
    launches: Counter[str] = Counter()
    monkeypatch.setattr(
        triton.runtime.jit.JITFunction, "run", lambda kernel, *_, **__: launches.update([kernel.__name__])
    )
    if with_values:
        monkeypatch.setattr(torch, "empty", torch.zeros)
        monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    return launches
