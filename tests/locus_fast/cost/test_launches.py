"""Kernel launches and waits of a step: the ledger against what is dispatched on meta tensors."""

from __future__ import annotations

import types
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from locus_kernels.shared_prefix_attention import backends, layout
from torch.utils._python_dispatch import TorchDispatchMode

from locus_fast import cost
from locus_fast.cost.shapes import Group
from locus_fast.cost.traffic import step_launches
from locus_fast.model import attention, packing
from locus_fast.model.families import shape_of
from locus_fast.model.fused import fuse
from locus_fast.model.packing import PromptBatch
from locus_fast.model.policy import checkpoint_activations, prefill, reply_hidden
from locus_fast.step import rollout
from locus_fast.step.rollout import Decoder, Sampling
from locus_fast.step.vocabulary import Vocabulary
from tests.locus_fast.cost_cases import (
    ENDLESS,
    FAMILIES,
    GRIDS,
    REPLIES,
    answers,
    group_like,
)
from tests.locus_fast.liger_cases import leave_kernels_out
from tests.small_models import small_model, small_prompt

VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "split",
        "split_with_sizes",
    ),
    *(
        "unbind",
        "detach",
        "alias",
        "as_strided",
        "_reshape_alias",
        "lift_fresh",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
    ),
}


class Operators(TorchDispatchMode):
    """Counts dispatched operators that compute, and kernels that are counted elsewhere."""

    def __init__(self, kernels: Counter[str]) -> None:
        super().__init__()
        self.kernels, self.launches = kernels, 0

    def __enter__(self) -> Operators:
        self.launches -= self.kernels.total()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.launches += self.kernels.total()
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.launches += function.name().split("::")[1].split(".")[0] not in VIEWS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("checkpointing", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_launches_of_a_step(
    family: str, checkpointing: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the path that CUDA takes, with tensors that hold no values."""
    kernels = leave_kernels_out(monkeypatch) if fused else Counter()
    for module in (layout, packing, rollout):
        monkeypatch.setattr(module, "send", lambda tensor, device: tensor.to(device))
    model = small_model(family)
    prompts = [small_prompt(model, grids, words=5, seed=0) for grids in GRIDS]
    model = model.to("meta", torch.bfloat16)
    monkeypatch.setattr(attention, "_chosen", lambda *_: backends._torch_cuda())
    if fused:
        fuse(model)
    batch, groups = (
        PromptBatch.of(prompts, model.config, "meta"),
        [group_like(p, r) for p, r in zip(prompts, REPLIES, strict=True)],
    )
    if checkpointing:
        checkpoint_activations(model, checkpointing)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    scored = answers(batch, groups)
    with Operators(kernels) as forward:
        hidden = reply_hidden(model, prefill(model, batch), scored)
    with Operators(kernels) as backward:
        hidden.sum().backward()
    table = step_launches(
        shape_of(model.config), [groups], checkpointing=checkpointing, reference=False, fused=fused
    )
    assert forward.launches == pytest.approx(table["forward"], rel=0.05)
    assert backward.launches == pytest.approx(table["backward"] + table["recompute"], rel=0.05)

    monkeypatch.setattr(
        rollout,
        "Count",
        lambda lag, on_cuda: types.SimpleNamespace(known=lambda most: 6, ask=lambda running: None),
    )
    monkeypatch.setattr(rollout, "Graph", lambda function, other: function)
    words = Vocabulary(*(t.to("meta") for t in (ENDLESS.allowed, ENDLESS.stops)))
    with torch.no_grad():
        prefix = prefill(model.eval(), batch)
        few, more = (decoding(model, words, prefix, tokens, kernels) for tokens in (2, 7))
    a_step = [replace(group, replies=(6,) * 3) for group in groups]
    table = step_launches(shape_of(model.config), [a_step], checkpointing=0, reference=False, fused=fused)
    assert more - few == pytest.approx(table["decode"], rel=0.05)


def decoding(model, words: Vocabulary, prefix, tokens: int, kernels: Counter[str]) -> int:
    with Operators(kernels) as steps:
        Decoder(model, words, static=True).generate(
            prefix, Sampling(3, tokens, 1.0, 1.0), seed=0, groups=[0, 1]
        )
    return steps.launches


def test_syncs_of_a_step() -> None:
    """That nothing else waits is tested in test_no_waiting.py."""
    assert sum(cost.step_syncs([[Group((), 10, (3,))]] * 5).values()) == 5 + 1
