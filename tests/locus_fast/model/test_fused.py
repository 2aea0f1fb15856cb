"""liger-kernel's operators in the model. Their cases, with values: interpret_fused.py."""

from __future__ import annotations

import pytest
import torch

from locus_fast.model import attention
from locus_fast.model.fused import FORWARDS, can_fuse
from tests.kernels.interpreter import run_cases
from tests.small_models import small_model


@pytest.mark.parametrize(
    "interpret",
    [
        True,
        pytest.param(
            False,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_cases(interpret: bool, subtests: pytest.Subtests) -> None:
    run_cases("model/interpret_fused.py", interpret, folder="locus_fast", subtests=subtests)


def fused(model) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if getattr(vars(module).get("forward"), "__func__", None) in FORWARDS
    ]


def test_only_models_on_cuda_are_fused_and_only_for_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_fuse(torch.device("cpu"))
    assert can_fuse(torch.device("cuda"))
    monkeypatch.setattr("locus_fast.model.fused.find_spec", lambda name: None)
    assert not can_fuse(torch.device("cuda"))
    model = small_model("qwen3_vl")
    assert not fused(model)
    monkeypatch.setattr(attention, "can_fuse", lambda device: True)
    attention.use_attention(model)
    # language layers: norms, norms of queries and keys, MLP, attention; last norm; vision
    assert len(fused(model)) == 3 * (2 + 2 + 1 + 1) + 1 + 3
    attention.use_plain_attention(model, "sdpa")
    assert not fused(model)
