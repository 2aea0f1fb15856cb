"""Saved adapters: what is read computes what plain peft computes; what would not is refused, by the name of
its key or tensor, before any weight of the base is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from locus_fast.weights.checkpoint import TINY_BASE
from tests.locus_fast.adapter_cases import by_peft, last_logits, opened, saved_by_peft
from tests.locus_fast.model.adapter_file_cases import Spoil, each, each_name, keys
from tests.published import write_checkpoint

READ: dict[str, tuple[dict[str, Any], Spoil]] = {
    "rank-stabilised": ({"use_rslora": True}, keys()),
    "alphas by pattern": ({"alpha_pattern": {"up_proj": 20, r"layers\.2\..*proj": 3}}, keys()),
    "ranks by pattern": (
        {"rank_pattern": {"q_proj": 2, "model.language_model.layers.1.mlp.down_proj": 7}},
        keys(),
    ),
    "both, rank-stabilised": (
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}},
        keys(),
    ),
    "some layers": ({"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 3]}, keys()),
    "some parts by name": (
        {"target_modules": ["model.language_model.layers.2.self_attn.v_proj", "o_proj"]},
        keys(),
    ),
    "a start that leaves the base": ({"init_lora_weights": "orthogonal"}, keys()),
    "no start": ({"init_lora_weights": False}, keys()),
    "fan in, fan out": ({}, keys(fan_in_fan_out=True)),
    "dropout": ({"lora_dropout": 0.5}, keys()),
    "float16": ({}, each(lambda _, tensor: tensor.half())),
    "bfloat16": ({}, each(lambda _, tensor: tensor.bfloat16())),
    "float64": ({}, each(lambda _, tensor: tensor.double())),
    "no alpha at all": ({}, keys(lora_alpha=0)),
}


@pytest.mark.parametrize("name", READ)
def test_adapters_compute_what_they_do_in_peft(name: str, tmp_path: Path) -> None:
    settings, change = READ[name]
    folder = saved_by_peft(tmp_path / "adapter", TINY_BASE, **settings)
    change(folder)
    expected = by_peft(folder, TINY_BASE)
    for out in (None, tmp_path):  # merged for an evaluation; trained further
        assert (last_logits(opened(folder, out=out)) - expected).abs().max() <= 1e-4


def test_names_from_before_transformers_4_52_are_read(tmp_path: Path) -> None:
    """peft computes the same once they are renamed; left as they are it passes them over."""
    base = write_checkpoint(tmp_path / "base", "qwen2.5-vl")
    folder = saved_by_peft(tmp_path / "adapter", base, alpha_pattern={"layers.1.self_attn.q_proj": 30})
    expected = by_peft(folder, base)
    each_name(lambda name: name.replace("model.language_model.layers", "model.layers"))(folder)
    kinds = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        *(f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("up", "gate", "down")),
    ]
    keys(target_modules=kinds)(folder)
    assert (by_peft(folder, base) - expected).abs().max() > 0.1
    for out in (None, tmp_path):
        assert (last_logits(opened(folder, out=out)) - expected).abs().max() <= 1e-4
