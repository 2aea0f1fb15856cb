"""Cases of the fused modules; test_fused.py runs them under Triton's interpreter and on the GPU."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from locus_fast.model.attention import use_attention
from locus_fast.model.fused import fuse, unfuse
from locus_fast.model.packing import PromptBatch, Replies
from locus_fast.model.policy import checkpoint_activations, prefill, reply_logprob
from locus_fast.step.rollout import Decoder, Rollout, Sampling
from locus_fast.step.vocabulary import Vocabulary
from tests.kernels.interpreter import device
from tests.small_models import IMAGE, VOCABULARY, small_model, small_prompt

DEVICE = device()
FAMILIES = ["qwen2_5_vl", "qwen3_vl"]


@pytest.fixture(autouse=True)
def what_the_interpreter_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scalar floats as arguments, and libdevice."""
    if DEVICE == "cuda":
        return
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    plain = interpreter._implicit_cvt

    def convert(value):
        handle = (
            interpreter.TensorHandle(np.array([value], np.float32), tl.float32)
            if isinstance(value, float)
            else None
        )
        return plain(value) if handle is None else tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))


def task(family: str, dtype: torch.dtype = torch.float32):
    """(model on its own modules, prompts, replies of 3, 1, 2 and 2 tokens)."""
    model = small_model(family).to(DEVICE, dtype)
    use_attention(model)
    unfuse(model)
    prompts = [small_prompt(model, grids, words=2, seed=seed) for seed, grids in enumerate([[(4, 8)], []])]
    ids = torch.randint(3, 290, (4, 3), generator=torch.Generator().manual_seed(7)).to(DEVICE)
    played = Rollout(
        ids,
        torch.tensor([3, 1, 2, 2], device=DEVICE),
        torch.zeros(4, 3, device=DEVICE),
        torch.zeros(4, dtype=torch.bool),
    )
    return model, PromptBatch.of(prompts, model.config, DEVICE), played


def trained(model, batch: PromptBatch, played: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    replies = Replies.of(batch, played.ids, [[3, 1], [2, 2]], range(2))
    logprob, _ = reply_logprob(model, prefill(model, batch), replies, 1.0)
    logprob.sum().backward()
    return logprob.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(("family", "checkpointing"), [("qwen2_5_vl", False), ("qwen3_vl", True)])
def test_logprobs_and_gradients_are_the_modules_own(family: str, checkpointing: bool) -> None:
    model, batch, played = task(family)
    if checkpointing:
        checkpoint_activations(model)
    expected, expected_gradient = trained(model, batch, played)
    fuse(model)
    logprob, gradient = trained(model, batch, played)
    torch.testing.assert_close(logprob, expected, rtol=0, atol=1e-5)
    assert gradient.keys() == expected_gradient.keys()
    for name, value in gradient.items():
        assert (value - expected_gradient[name]).norm() <= 1e-5 * expected_gradient[name].norm().clamp(
            min=1e-6
        ), name
    unfuse(model)
    assert torch.equal(trained(model, batch, played)[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_draws_the_same_tokens(family: str) -> None:
    model, batch, _ = task(family)
    words = Vocabulary((torch.arange(VOCABULARY) < IMAGE).to(DEVICE), torch.tensor([2], device=DEVICE))
    drawn = []
    for change in (unfuse, fuse):
        change(model)
        with torch.no_grad():
            drawn.append(
                Decoder(model, words).generate(
                    prefill(model, batch), Sampling(2, 3, 1.0, 1.0), seed=5, groups=[0, 1]
                )
            )
    assert torch.equal(drawn[0].ids, drawn[1].ids)
    torch.testing.assert_close(drawn[0].logprob, drawn[1].logprob, rtol=0, atol=1e-5)


class Operators(TorchDispatchMode):
    """Counts PyTorch's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.name().split("::")[1].split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_ligers_kernels_that_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, _ = task(family)
    fuse(model)
    kernels: Counter[str] = Counter()
    for kind in (triton.runtime.jit.JITFunction, triton.runtime.interpreter.InterpretedFunction):
        run = kind.run
        monkeypatch.setattr(
            kind,
            "run",
            lambda self, *a, run=run, **k: (kernels.update([self.__name__]), run(self, *a, **k))[1],
        )
    with torch.no_grad(), Operators() as operators:
        prefill(model, batch)
    gated, L, D = family == "qwen2_5_vl", 3, 3  # layers of language model and vision tower
    assert kernels["_rms_norm_forward_kernel"] == 2 * L + 1 + (2 * D + 1 if gated else 2 * L)
    assert kernels["_swiglu_forward_kernel"] == L + (D if gated else 0)
    assert kernels["_triton_rope"] == L + D
    assert not operators.names.keys() & {"rsqrt", "pow", "silu", "neg"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_runs_on_its_own_weights(family: str) -> None:
    model, batch, _ = task(family)
    fuse(model)
    other = copy.deepcopy(model)
    assert all(module.forward.__self__ is module for module in other.modules() if "forward" in vars(module))
    with torch.no_grad():
        other.model.language_model.norm.weight.mul_(2)
        torch.testing.assert_close(prefill(other, batch).last_hidden, 2 * prefill(model, batch).last_hidden)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter gets bfloat16 wrong")
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_good_as_the_modules_own(family: str) -> None:
    """Against float32 truth, with the modules' own error as the yardstick."""
    model, batch, played = task(family)
    truth, _ = trained(model, batch, played)
    model, batch, played = task(family, torch.bfloat16)
    own, _ = trained(model, batch, played)
    fuse(model)
    logprob, _ = trained(model, batch, played)
    assert (logprob - truth).abs().max() <= 2 * (own - truth).abs().max() + 1e-6
