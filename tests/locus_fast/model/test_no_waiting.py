"""The path that CUDA takes, on meta tensors, which hold no values: whatever would wait for the device to read
one back fails here."""

from __future__ import annotations

import types

import pytest
import torch
from locus_kernels.shared_prefix_attention import backends, layout

from locus_fast.model import attention, packing
from locus_fast.model.fused import fuse
from locus_fast.model.packing import PromptBatch, Replies
from locus_fast.model.policy import checkpoint_activations, prefill, reply_logprob
from locus_fast.step import rollout
from locus_fast.step.rollout import Rollout
from tests.locus_fast.liger_cases import leave_kernels_out
from tests.small_models import VOCABULARY, small_model, small_prompt

LENGTHS = [[5, 4, 1], [5, 5, 2]]


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl", "qwen2_5_vl fused", "qwen3_vl fused"])
def task(request, monkeypatch):
    """A model on the meta device with the packed FlashAttention of PyTorch, as it is or fused, and a batch of
    two prompts."""
    family, *fused = request.param.split()
    for module in (layout, packing, rollout):
        monkeypatch.setattr(module, "send", lambda tensor, device: tensor.to(device))
    model = small_model(family)
    prompts = [
        small_prompt(model, [(8, 12), (4, 4)], words=6, seed=0),
        small_prompt(model, [(4, 8)], words=3, seed=1),
    ]
    model = model.to("meta", torch.bfloat16)
    monkeypatch.setattr(attention, "_chosen", lambda *_: backends._torch_cuda())
    if fused:
        leave_kernels_out(monkeypatch)
        fuse(model)
    return model, PromptBatch.of(prompts, model.config, "meta")


def test_meta_tensors_refuse_to_be_read() -> None:
    t = torch.ones(3, device="meta")
    for read in (
        lambda: t.sum().item(),
        lambda: t.tolist(),
        lambda: t.nonzero(),
        lambda: t[t > 0],
        lambda: bool(t.any()),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()


@pytest.mark.parametrize("checkpointing", [0, 1, 2])
def test_training(task, checkpointing: int) -> None:
    model, batch = task
    if checkpointing:
        checkpoint_activations(model, checkpointing)
    prefix = prefill(model, batch)
    played = Rollout(
        *(
            torch.zeros(6, 5, device="meta", dtype=dtype)
            for dtype in (torch.int64, torch.int64, torch.float32, torch.bool)
        )
    )
    replies = Replies.of(batch, played.ids, LENGTHS, [0, 1])
    logprob, entropy = reply_logprob(model, prefix, replies, 1.0)
    assert logprob.shape == entropy.shape == (22,)
    logprob.sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing


def test_rollout(task, monkeypatch) -> None:
    """Six replies over two prompts that end one after the other; buffers of a fixed place, no length known to
    the host."""
    model, batch = task
    told = iter([6, 6, 3, 2, 1])
    monkeypatch.setattr(
        rollout,
        "Count",
        lambda lag, on_cuda: types.SimpleNamespace(known=lambda most: next(told), ask=lambda running: None),
    )
    monkeypatch.setattr(rollout, "Graph", lambda function, other: function)
    words = rollout.Vocabulary(
        torch.ones(VOCABULARY, dtype=torch.bool, device="meta"),
        torch.zeros(2, dtype=torch.int64, device="meta"),
        torch.zeros(VOCABULARY, 5, dtype=torch.int16, device="meta"),
    )
    decoder = rollout.Decoder(model, words, static=True)
    with torch.no_grad():
        out = decoder.generate(prefill(model, batch), rollout.Sampling(3, 6, 1.0, 1.0), seed=0, groups=[0, 1])
    assert out.ids.shape == (6, 6)
    assert decoder.slots is not None
    assert decoder.slots.rows == 1
