"""The one idiom by which operators reach their code."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from locus_kernels import dispatch
from locus_kernels.sample import reference

from tests.kernels.interpreter import ROOT, environment_of_cases

# operator -> functions that `reference.py` and `triton.py` both have
SHARED = {
    "adamw8bit": ["adamw8bit_"],
    "box_reward": ["read_boxes", "box_reward"],
    "grpo_loss": ["forward"],
    "linear_logprob": ["forward", "backward"],
    "patchify": ["patchify_images"],
    "sample": ["sample"],
    "shared_prefix_decode": ["shared_prefix_decode"],
}


def test_tensors_of_cuda_take_the_kernels_and_all_others_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(dispatch, "import_module", lambda name: loaded.append(name))
    for device in ("cpu", "meta"):
        assert dispatch.implementation(reference, torch.empty(0, device=device)) is reference
    assert not loaded
    dispatch.implementation(reference, SimpleNamespace(is_cuda=True))  # type: ignore[arg-type]
    assert loaded == ["locus_kernels.sample.triton"]


@pytest.mark.parametrize("operator", SHARED)
def test_reference_and_kernels_have_functions_of_one_signature(operator: str) -> None:
    """The kernels' may take keywords more, for tuning; none of these is required."""
    pytest.importorskip("triton")
    sides = [importlib.import_module(f"locus_kernels.{operator}.{side}") for side in ("reference", "triton")]
    for name in SHARED[operator]:
        plain, fast = (inspect.signature(getattr(side, name)) for side in sides)
        extra = [p for p in fast.parameters.values() if p.name not in plain.parameters]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in extra)
        assert list(plain.parameters.values()) == [p for p in fast.parameters.values() if p not in extra]
        assert plain.return_annotation == fast.return_annotation


def test_importing_the_operators_imports_no_triton() -> None:
    """A machine without CUDA need not have it."""
    names = ", ".join(f"locus_kernels.{operator}" for operator in [*SHARED, "shared_prefix_attention"])
    script = f"import sys; sys.modules['triton'] = None; import {names}"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=environment_of_cases())
