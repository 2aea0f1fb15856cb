"""The full published models without their weights: parameter counts, tensor names against the published
lists, and what training reaches.

The lists are written as patterns with layer numbers, from the architectures' own definitions; they were not
fetched from the hub for this test. What holds them to the published indexes are figures that those state and
others quote: 729 tensors and `total_size` 16,584,333,312 for Qwen2.5-VL-7B-Instruct, 824 and 7,509,245,952
for the 3B one; 713 and 8,875,631,616 for Qwen3-VL-4B (Instruct and Thinking have one architecture), of which
the vision tower's are 315 and 830,695,424; 16,612,434,432 for MiMo-VL-7B-RL, a Qwen2.5-VL with the language
model of MiMo-7B and a wider MLP in the vision tower, 3,456.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from locus_fast.model.packing import PromptBatch, Replies
from locus_fast.model.policy import checkpoint_activations, prefill, reply_logprob
from locus_fast.step.rollout import Rollout
from locus_fast.weights.checkpoint import load_model
from locus_fast.weights.shards import held_name
from tests.full_sizes import SIZES, full_config
from tests.published import write_checkpoint
from tests.small_models import small_prompt


def expand(*patterns: str, **counts: int) -> set[str]:
    """Names of patterns: {a,b} are alternatives, and #block counts from 0 to counts["block"] - 1."""
    names: set[str] = set()
    for pattern in patterns:
        choices = [
            part.split(",") if i % 2 else [part] for i, part in enumerate(re.split(r"\{(.*?)\}", pattern))
        ]
        names |= {"".join(chosen) for chosen in itertools.product(*choices)}
    for what, count in counts.items():
        names = {name.replace(f"#{what}", str(i)) for name in names for i in range(count)}
    return names


def qwen25_names(layers: int) -> set[str]:
    return expand(
        "visual.patch_embed.proj.weight",
        "visual.blocks.#block.{norm1,norm2}.weight",
        "visual.blocks.#block.{attn.qkv,attn.proj,mlp.gate_proj,mlp.up_proj,mlp.down_proj}.{weight,bias}",
        "visual.merger.ln_q.weight",
        "visual.merger.mlp.{0,2}.{weight,bias}",
        "model.embed_tokens.weight",
        "model.layers.#layer.{input_layernorm,post_attention_layernorm}.weight",
        "model.layers.#layer.self_attn.{q_proj,k_proj,v_proj}.{weight,bias}",
        "model.layers.#layer.{self_attn.o_proj,mlp.gate_proj,mlp.up_proj,mlp.down_proj}.weight",
        "model.norm.weight",
        "lm_head.weight",
        block=32,
        layer=layers,
    )


def qwen3_names() -> set[str]:
    return expand(
        "model.visual.patch_embed.proj.{weight,bias}",
        "model.visual.pos_embed.weight",
        "model.visual.blocks.#block.{norm1,norm2,attn.qkv,attn.proj}.{weight,bias}",
        "model.visual.blocks.#block.{mlp.linear_fc1,mlp.linear_fc2}.{weight,bias}",
        "model.visual.merger.{norm,linear_fc1,linear_fc2}.{weight,bias}",
        "model.visual.deepstack_merger_list.{0,1,2}.{norm,linear_fc1,linear_fc2}.{weight,bias}",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.#layer.{input_layernorm,post_attention_layernorm}.weight",
        "model.language_model.layers.#layer.self_attn.{q_proj,k_proj,v_proj,o_proj,q_norm,k_norm}.weight",
        "model.language_model.layers.#layer.mlp.{gate_proj,up_proj,down_proj}.weight",
        "model.language_model.norm.weight",
        block=24,
        layer=36,
    )


# model: (tensor names, parameters)
PUBLISHED: dict[str, tuple[set[str], int]] = {
    "qwen2.5-vl-7b": (qwen25_names(layers=28), 16_584_333_312 // 2),
    "qwen2.5-vl-3b": (qwen25_names(layers=36) - {"lm_head.weight"}, 7_509_245_952 // 2),
    "mimo-vl-7b": (qwen25_names(layers=36), 16_612_434_432 // 2),
    "qwen3-vl-4b": (qwen3_names(), 8_875_631_616 // 2),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def full(request) -> tuple[str, Any]:
    """(name, the full model on the meta device), its config in the published form."""
    config = full_config(request.param)
    parsed = AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        return request.param, AutoModelForImageTextToText.from_config(parsed, dtype=torch.bfloat16)


def test_parameters(full) -> None:
    name, model = full
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name][1]
    if name == "qwen3-vl-4b":
        assert sum(p.numel() for p in model.model.visual.parameters()) == 830_695_424 // 2


def test_published_names_are_the_models(full) -> None:
    """Each published tensor is one of the model's, and each of the model's is published, but for the head
    that is tied to the embedding."""
    name, model = full
    names, state, tied = PUBLISHED[name][0], model.state_dict(), name in ("qwen2.5-vl-3b", "qwen3-vl-4b")
    assert (
        len(names)
        == {"qwen2.5-vl-7b": 729, "qwen2.5-vl-3b": 824, "mimo-vl-7b": 825, "qwen3-vl-4b": 713}[name]
    )
    if name == "qwen3-vl-4b":
        assert sum(name.startswith("model.visual.") for name in names) == 315
    held = {name: held_name(name, state) for name in names}
    assert len(set(held.values())) == len(names)
    assert set(held.values()) == state.keys() - ({"lm_head.weight"} if tied else set())
    assert model.config.tie_word_embeddings == tied


def without_numbers(names: Any) -> set[str]:
    """Names with every layer's number left out."""
    return {re.sub(r"\.\d+\.", ".#.", name) for name in names}


def test_training_reaches_every_parameter(full, tmp_path: Path) -> None:
    """In a small model of the same architecture, prompt and replies give every parameter a gradient that is
    not zero; and the full model has no parameter that the small one has not, layers counted once."""
    name, big = full
    family = SIZES[name][0]
    model, _ = load_model(write_checkpoint(tmp_path / family, family), torch.device("cpu"), torch.float32)
    checkpoint_activations(model)
    prompt = small_prompt(model, [(8, 12), (4, 6)], 9, seed=0, image=model.config.image_token_id)
    prefix = prefill(model, PromptBatch.of([prompt], model.config, "cpu"))
    ids = torch.randint(3, 200, (3, 6), generator=torch.Generator().manual_seed(1))
    rollout = Rollout(ids, torch.tensor([6, 4, 5]), torch.zeros(3, 6), torch.zeros(3, dtype=torch.bool))
    logprob, _ = reply_logprob(model, prefix, Replies.of(prefix.batch, rollout.ids, [[6, 4, 5]], [0]), 1.0)
    (logprob * torch.linspace(-1, 1, len(logprob))).sum().backward()
    small = dict(model.named_parameters())
    assert [name for name, p in small.items() if p.grad is None or not p.grad.any()] == []
    assert without_numbers(name for name, _ in big.named_parameters()) <= without_numbers(small)
    assert all(p.requires_grad for p in big.parameters())
