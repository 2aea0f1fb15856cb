"""Settings of config.json: those that are honoured give plain transformers' eager log-probs, in prompts,
replies and decoding; those that are not are refused with file, key and value, before any weight is read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLConfig

from locus_fast import train
from locus_fast.errors import UserError
from locus_fast.model.attention import use_attention, use_plain_attention
from locus_fast.model.fused import fuse
from locus_fast.model.packing import Replies
from locus_fast.model.policy import prefill, reply_logprob
from locus_fast.model.switches import GENERAL, TEXT, VISION, check_switches
from locus_fast.step.rollout import Decoder, Sampling
from locus_fast.step.vocabulary import Vocabulary
from locus_fast.weights.checkpoint import load_model
from locus_fast.weights.source import read_source
from tests.locus_fast.adapter_cases import CPU, GROUP, drawn
from tests.locus_fast.model.switch_cases import BOTH, NEW, OLD, Change, read_config, rotary, text, vision
from tests.locus_fast.source_cases import DATA, RECIPE, SIZES, fields
from tests.published import write_checkpoint, write_shards
from tests.small_models import small_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

HONOURED: dict[str, tuple[tuple[str, ...], Change]] = {
    "as published": (BOTH, lambda config: None),
    "windows on no layer": ((OLD,), text(use_sliding_window=True, sliding_window=4, max_window_layers=2)),
    "a window that is off": ((OLD,), text(use_sliding_window=False, sliding_window=4, max_window_layers=0)),
    "layer types": ((OLD,), text(layer_types=["full_attention"] * 2)),
    "linear rotary": (BOTH, rotary(rope_type="linear", factor=4.0)),
    "yarn": (BOTH, rotary(**YARN)),
    "yarn with an attention factor": (BOTH, rotary(**YARN, attention_factor=1.5)),
    "llama3 rotary": (BOTH, rotary(**LLAMA3)),
    "rotary of type mrope": ((OLD,), rotary(rope_type=None, type="mrope")),
    "another base": (BOTH, text(rope_theta=100.0)),
    "other sections": (BOTH, rotary(mrope_section=[0, 4, 4])),
    "biases of attention": ((NEW,), text(attention_bias=True)),
    "gelu": (BOTH, text(hidden_act="gelu")),
    "squared relu": (BOTH, text(hidden_act="relu2")),
    "one key head": (BOTH, text(num_key_value_heads=1)),
    "a key head each": (BOTH, text(num_key_value_heads=4)),
    "key heads that are null": (
        BOTH,
        lambda config: config.get("text_config", config).update(num_key_value_heads=None),
    ),
    "wider heads": (
        (NEW,),
        lambda config: (text(head_dim=32)(config), rotary(mrope_section=[6, 5, 5])(config)),
    ),
    "another epsilon": (BOTH, text(rms_norm_eps=0.5)),
    "few positions": (BOTH, text(max_position_embeddings=8)),
    "a padding id": (BOTH, text(pad_token_id=5)),
    "hidden states asked for": (BOTH, text(output_hidden_states=True)),
    "gelu in the tower": ((OLD,), vision(hidden_act="gelu")),
    "silu in the tower": ((NEW,), vision(hidden_act="silu")),
    "no full block": ((OLD,), vision(fullatt_block_indexes=[])),
    "full blocks alone": ((OLD,), vision(fullatt_block_indexes=[0, 1, 2])),
    "full blocks that are not there": ((OLD,), vision(fullatt_block_indexes=[-1, 7])),
    "smallest windows": ((OLD,), vision(window_size=28)),
    "windows of no whole cells": ((OLD,), vision(window_size=40)),
    "windows larger than images": ((OLD,), vision(window_size=280)),
    "no deep features": ((NEW,), vision(deepstack_visual_indexes=[])),
    "deep features in another order": ((NEW,), vision(deepstack_visual_indexes=[1, 0])),
    "deep features of no block": ((NEW,), vision(deepstack_visual_indexes=[0, 9])),
    "positions that are no square": ((NEW,), vision(num_position_embeddings=60)),
    "three frames": (BOTH, vision(temporal_patch_size=3)),
    "one frame": (BOTH, vision(temporal_patch_size=1)),
    "no merging": (BOTH, vision(spatial_merge_size=1)),
    "heads in the tower": (BOTH, vision(num_heads=8)),
    "rotary base of the tower": (BOTH, vision(rope_theta=100.0)),
    "frames a second": (BOTH, vision(tokens_per_second=25)),
}


def eager_logprobs(model: Any, prompts: list, replies: torch.Tensor) -> torch.Tensor:
    """Of every reply token, by transformers' eager attention over one prompt and one reply at a time."""
    use_plain_attention(model, "eager")
    out = []
    for row, reply in enumerate(replies):
        prompt = prompts[row // GROUP]
        ids = torch.cat([prompt.ids, reply])[None]
        images = {"pixel_values": prompt.patches, "image_grid_thw": prompt.grids}
        logits = model(
            input_ids=ids,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            use_cache=False,
            **images,
        ).logits[0]
        out.append(logits[len(prompt.ids) - 1 : -1].log_softmax(-1).gather(-1, reply[:, None])[:, 0])
    use_attention(model)
    return torch.cat(out)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name, (families, _) in HONOURED.items() for family in families]
)
def test_settings_that_are_honoured(name: str, family: str, tmp_path: Path) -> None:
    config = read_config(tmp_path, family, HONOURED[name][1])
    check_switches(tmp_path / "config.json", config)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    # the default initialisation is so small that attention is nearly uniform and hides errors
    for p in model.parameters():
        p.copy_(torch.randn_like(p) * (0.1 if p.ndim >= 2 else 0.02) + (p.ndim < 2) * p)
    use_attention(model)
    prompts, batch, replies = drawn(model.config)
    theirs = eager_logprobs(model, prompts, replies.ids.view(2 * GROUP, -1))
    prefix = prefill(model, batch)
    torch.testing.assert_close(reply_logprob(model, prefix, replies, 1.0)[0], theirs, rtol=0, atol=2e-5)
    vocabulary = Vocabulary(torch.arange(model.lm_head.weight.shape[0]) < 200, torch.tensor([2]))
    rollout = Decoder(model, vocabulary).generate(prefix, Sampling(GROUP, 6, 1.0, 1.0), seed=0, groups=[0, 1])
    lengths = rollout.lengths.tolist()
    again = Replies.of(batch, rollout.ids, [lengths[:GROUP], lengths[GROUP:]], [0, 1])
    sampled = torch.cat([rollout.logprob[r, :n] for r, n in enumerate(lengths)])
    torch.testing.assert_close(reply_logprob(model, prefix, again, 1.0)[0], sampled, rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", [Qwen2_5_VLConfig(), Qwen3VLConfig()], ids=BOTH)
def test_every_setting_of_the_families_is_in_a_table(config: Any) -> None:
    """Of the transformers that is installed: a newer one's new setting fails here."""
    for part, table in ((config.text_config, TEXT), (config.vision_config, VISION)):
        assert {field.name for field in dataclasses.fields(part)} - GENERAL <= table.keys()


def test_a_setting_that_a_newer_transformers_adds_is_refused_unless_it_is_at_its_default(
    tmp_path: Path, monkeypatch
) -> None:
    folder = write_checkpoint(tmp_path / "model", NEW)
    monkeypatch.delitem(TEXT, "attention_bias")
    read_source(folder)
    fields(
        "config.json",
        text_config={
            **json.loads((folder / "config.json").read_text())["text_config"],
            "attention_bias": True,
        },
    )(folder)
    monkeypatch.setattr("locus_fast.weights.source._check_tensors", lambda *_: None)
    with pytest.raises(
        UserError, match=r"attention_bias is true, and must be false, no other value is known here"
    ):
        read_source(folder)


def test_a_head_of_its_own_beside_tied_weights_is_refused(tmp_path: Path, capsys) -> None:
    """transformers would train it apart; whoever reads final/ by its config would tie it."""
    folder = write_checkpoint(tmp_path / "model", NEW)
    tensors = {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    embedding = tensors["model.language_model.embed_tokens.weight"]
    write_shards(folder, {**tensors, "lm_head.weight": embedding.clone()}, 3)
    model, _ = load_model(folder, CPU)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    write_shards(folder, {**tensors, "lm_head.weight": embedding + 1}, 3)
    assert (
        train.main(["--model", str(folder), "--data", DATA, "--out", str(tmp_path / "run"), *RECIPE, *SIZES])
        == 2
    )
    assert (
        f"{folder / 'config.json'}: tie_word_embeddings is true, and lm_head.weight is stored with other "
        "values" in capsys.readouterr().err
    )
    fields("config.json", tie_word_embeddings=False)(folder)
    model, _ = load_model(folder, CPU)
    assert torch.equal(model.lm_head.weight, embedding + 1)


def test_only_silu_is_fused() -> None:
    """Another activation keeps the module's own forward."""
    for act in ("silu", "gelu"):
        model = small_model("qwen2_5_vl", hidden_act=act)
        fuse(model)
        assert ("forward" in vars(model.model.language_model.layers[0].mlp)) == (act == "silu")
