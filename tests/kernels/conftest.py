"""What the tests of several operators ask for."""

from __future__ import annotations

import pytest


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched; none runs, so that tensors need no values."""
    triton = pytest.importorskip("triton")
    from locus_kernels.linear_logprob import triton_head

    names: list[str] = []
    kernel = triton.runtime.jit.KernelInterface
    monkeypatch.setattr(
        kernel, "__getitem__", lambda self, grid: lambda *a, **k: names.append(self.fn.__name__)
    )
    monkeypatch.setattr(triton_head, "INTERPRETED", True)  # no CUDA device is asked for
    monkeypatch.setattr(triton_head, "_bulk_readable", lambda matrix: False)
    monkeypatch.setattr(triton_head, "_aligned", lambda matrix: True)
    return names
