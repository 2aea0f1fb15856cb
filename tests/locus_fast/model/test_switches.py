"""Settings of config.json: those that are honoured give plain transformers' eager log-probs, in prompts,
replies and decoding; those that are not are refused with file, key and value, before any weight is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLConfig

from locus_fast import train
from locus_fast.errors import UserError
from locus_fast.model.attention import use_attention, use_plain_attention
from locus_fast.model.fused import fuse
from locus_fast.model.packing import Replies
from locus_fast.model.policy import prefill, reply_logprob
from locus_fast.model.switches import GENERAL, TEXT, VISION, check_switches
from locus_fast.run import model as runtime
from locus_fast.step.rollout import Decoder, Sampling
from locus_fast.step.vocabulary import Vocabulary
from locus_fast.weights.checkpoint import load_model
from locus_fast.weights.source import read_source
from tests.locus_fast.adapter_cases import CPU, GROUP, drawn
from tests.locus_fast.source_cases import DATA, RECIPE, SIZES, fields
from tests.published import config_of, write_checkpoint, write_shards
from tests.small_models import small_model

OLD, NEW = "qwen2.5-vl", "qwen3-vl"  # flat and nested configs
BOTH = (OLD, NEW)
Change = Callable[[dict[str, Any]], Any]


def text(**values: Any) -> Change:
    """Sets keys of the language model's part, wherever the family publishes it; None takes one away."""
    return lambda config: put(config.get("text_config", config), values)


def vision(**values: Any) -> Change:
    return lambda config: put(config["vision_config"], values)


def rotary(**values: Any) -> Change:
    return lambda config: put(config.get("text_config", config)["rope_scaling"], values)


def put(part: dict[str, Any], values: dict[str, Any]) -> None:
    part.update(values)
    for key in [key for key, value in values.items() if value is None]:
        del part[key]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 16,
    "factor": 4.0,
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


def read_config(folder: Path, family: str, change: Change) -> Any:
    """transformers' reading of a family's config.json after a change."""
    stated = config_of(family)
    change(stated)
    (folder / "config.json").write_text(json.dumps(stated))
    return AutoConfig.from_pretrained(folder)


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


REFUSED: dict[str, tuple[tuple[str, ...], Change, str]] = {
    "sliding windows": (
        (OLD,),
        text(use_sliding_window=True, sliding_window=4, max_window_layers=0),
        "use_sliding_window is true, and must be false, or max_window_layers no less than num_hidden_layers",
    ),
    "a window on the last layer": (
        (OLD,),
        text(use_sliding_window=True, max_window_layers=1),
        "use_sliding_window is true, and must be false",
    ),
    "sliding layers": (
        (OLD,),
        text(layer_types=["full_attention", "sliding_attention"]),
        'layer_types is ["full_attention", "sliding_attention"], '
        'and must be "full_attention" for every layer',
    ),
    "linear layers": ((NEW,), text(layer_types=["linear_attention"] * 3), "layer_types is"),
    "dynamic rotary": (
        BOTH,
        rotary(rope_type="dynamic", factor=4.0),
        'rope_type is "dynamic", and must be one of default, linear, yarn, llama3',
    ),
    "long rotary": (BOTH, rotary(**LONG), 'rope_type is "longrope", and must be one of default'),
    "rotary of tomorrow": (BOTH, rotary(rope_type="foo"), 'rope_type is "foo", and must be one of default'),
    "partial rotary": (
        BOTH,
        rotary(partial_rotary_factor=0.5),
        "partial_rotary_factor is 0.5, and must be 1",
    ),
    "interleaved": (
        (OLD,),
        rotary(mrope_interleaved=True),
        "mrope_interleaved is true, and must be false, as qwen2_5_vl is computed",
    ),
    "not interleaved": (
        (NEW,),
        rotary(mrope_interleaved=False),
        "mrope_interleaved is false, and must be true, as qwen3_vl is computed",
    ),
    "two sections": (
        BOTH,
        rotary(mrope_section=[4, 4]),
        "mrope_section [4, 4] must be three numbers that add up to 8",
    ),
    "sections that are not said": (
        BOTH,
        rotary(mrope_section=None),
        "must be three numbers that add up to 8",
    ),
    "dropout": (
        BOTH,
        text(attention_dropout=0.1),
        "attention_dropout is 0.1, and must be 0: the sampler is the policy",
    ),
    "soft cap of attention": (
        (NEW,),
        text(attn_logit_softcapping=50.0),
        "attn_logit_softcapping is 50.0, and must be left away",
    ),
    "soft cap of attention, flat": (
        (OLD,),
        text(attn_logit_softcapping=50.0),
        "attn_logit_softcapping is 50.0, and must be left away",
    ),
    "soft cap of the head": (
        BOTH,
        text(final_logit_softcapping=30.0),
        "final_logit_softcapping is 30.0, and must be left away",
    ),
    "chunks": (BOTH, text(attention_chunk_size=4), "attention_chunk_size is 4, and must be left away"),
    "both ways": (
        (NEW,),
        text(is_causal=False),
        "is_causal is false, and must be true: every token attends to what is before it alone",
    ),
    "tuples": ((NEW,), text(return_dict=False), "return_dict is false, and must be true"),
    "key heads that do not divide": (
        BOTH,
        text(num_key_value_heads=3),
        "num_key_value_heads is 3, and must be a divisor of num_attention_heads",
    ),
    "no key heads": (BOTH, text(num_key_value_heads=0), "num_key_value_heads is 0, and must be a divisor"),
    "no heads": (
        (NEW,),
        text(num_attention_heads=0),
        "num_attention_heads is 0, and must be a whole number above 0",
    ),
    "channels": (BOTH, vision(in_channels=1), "in_channels is 1, and must be 3: images are read as RGB"),
    "oblong patches": (
        BOTH,
        vision(patch_size=[14, 14]),
        "patch_size is [14, 14], and must be a whole number above 0",
    ),
    "frames in a list": (
        BOTH,
        vision(temporal_patch_size=[2]),
        "temporal_patch_size is [2], and must be a whole number above 0",
    ),
    "heads of the tower": (BOTH, vision(num_heads=3), "num_heads is 3, and must be a divisor of hidden_size"),
    "thin heads of the tower": (
        BOTH,
        vision(num_heads=16),
        "num_heads is 16, and must be a divisor of hidden_size that leaves each head a multiple of 4",
    ),
    "width of the tower": (
        BOTH,
        vision(out_hidden_size=32),
        "out_hidden_size is 32, and must be 64, hidden_size of the language model",
    ),
    "no windows": (
        (OLD,),
        vision(window_size=0),
        "window_size is 0, and must be at least patch_size * spatial_merge_size",
    ),
    "windows below a token": ((OLD,), vision(window_size=27), "window_size is 27, and must be at least"),
    "endless windows": ((OLD,), vision(window_size=10**6), "window_size is 1000000, and must be at least"),
    "heads of the tower by name": (BOTH, vision(head_dim=32), "head_dim is 32, and must be left away"),
    "a tower that looks back": (BOTH, vision(is_causal=True), "is_causal is true, and must be left away"),
}


@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name, (families, *_) in REFUSED.items() for family in families]
)
def test_settings_that_are_not_honoured(name: str, family: str, tmp_path: Path) -> None:
    _, change, sentence = REFUSED[name]
    config = read_config(tmp_path, family, change)
    with pytest.raises(UserError) as refused:
        check_switches(tmp_path / "config.json", config)
    assert str(refused.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert sentence in str(refused.value)


@pytest.mark.parametrize("name", ["sliding windows", "rotary of tomorrow", "no key heads", "no windows"])
def test_a_run_with_a_setting_that_is_not_honoured(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Also where transformers cannot make a model of it."""
    _, change, sentence = REFUSED[name]
    folder = write_checkpoint(tmp_path / "model", OLD)
    read_config(folder, OLD, change)
    monkeypatch.setattr(runtime, "load_source", None)
    assert (
        train.main(["--model", str(folder), "--data", DATA, "--out", str(tmp_path / "run"), *RECIPE, *SIZES])
        == 2
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {folder / 'config.json'}: ")
    assert sentence in lines[0]
    assert not (tmp_path / "run").exists()


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


PREPARED = {
    "do_resize": False,
    "do_rescale": False,
    "do_normalize": False,
    "rescale_factor": 1 / 127.5,
    "resample": 2,
    "patch_size": 16,
    "merge_size": 1,
    "temporal_patch_size": 1,
}


@pytest.mark.parametrize("key", PREPARED)
def test_images_that_are_prepared_otherwise_are_refused(key: str, tmp_path: Path) -> None:
    """By the image processor's config: what plain transformers would then show the model is not what it is
    trained on."""
    folder = write_checkpoint(tmp_path / "model", OLD)
    own = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 0.00392156862745098,
        "resample": 3,
    }
    fields("preprocessor_config.json", **own)(folder)
    read_source(folder)
    fields("preprocessor_config.json", **{key: PREPARED[key]})(folder)
    with pytest.raises(
        UserError, match=rf"preprocessor_config\.json: {key} is {json.dumps(PREPARED[key])}, and must be "
    ):
        read_source(folder)
