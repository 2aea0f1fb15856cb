"""Adapters that are refused, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from locus_fast import train
from locus_fast.run import model as runtime
from locus_fast.weights.checkpoint import TINY_BASE
from tests.locus_fast.adapter_cases import by_peft, last_logits, opened, saved_by_peft
from tests.locus_fast.model.adapter_file_cases import CONFIG, WEIGHTS, Spoil, each, each_name, keys, tensors

PREFIX = "base_model.model.model.language_model.layers"
Q = f"{PREFIX}.0.self_attn.q_proj"


def without(*names: str) -> Spoil:
    return tensors(lambda held: {name: tensor for name, tensor in held.items() if name not in names})


def also(*names: str) -> Spoil:
    """Adds tensors."""
    return tensors(lambda held: held.update({name: torch.ones(4, 4) for name in names}))


def one(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return tensors(lambda held: held.update({name: change(held[name]).contiguous()}))


REFUSED: dict[str, tuple[Spoil, str]] = {
    "PiSSA": (
        keys(init_lora_weights="pissa"),
        f'{CONFIG}: init_lora_weights is "pissa", which took a part of the base',
    ),
    "fast PiSSA": (keys(init_lora_weights="pissa_niter_4"), "path_initial_model_for_weight_conversion"),
    "OLoRA": (keys(init_lora_weights="olora"), "do not belong to the base as it is"),
    "LoftQ": (
        keys(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
        'init_lora_weights is "loftq"',
    ),
    "CorDA": (keys(init_lora_weights="corda"), 'init_lora_weights is "corda"'),
    "LoRA-GA": (keys(init_lora_weights="lora_ga"), 'init_lora_weights is "lora_ga"'),
    "an unknown start": (keys(init_lora_weights="of tomorrow"), 'init_lora_weights is "of tomorrow"'),
    "another method": (
        keys(peft_type="LOHA"),
        f"{CONFIG}: peft_type is 'LOHA', and only LORA is computed here",
    ),
    "DoRA": (
        keys(use_dora=True),
        f"{CONFIG}: use_dora is true, a variant of LoRA that is not computed here: merge it into its base "
        "with peft first.",
    ),
    "an unknown variant": (keys(use_rolora={"a": 1}), 'use_rolora is {"a": 1}, a variant of LoRA'),
    "saved modules": (keys(modules_to_save=["lm_head"]), 'modules_to_save is ["lm_head"], a variant of LoRA'),
    "token embeddings": (keys(trainable_token_indices=[3]), "trainable_token_indices is [3]"),
    "bias": (keys(bias="lora_only"), 'bias is "lora_only", and biases are not adapted here'),
    "bias of the pair": (keys(lora_bias=True), "lora_bias is true"),
    "revision": (keys(revision="v2"), 'revision is "v2": fetch that one'),
    "no r": (keys(r=None), f"does not hold whole adapters: {CONFIG} has no r."),
    "r of 0": (keys(r=0), "r is 0, and must be a whole number above 0"),
    "r of a half": (keys(r=4.5), "r is 4.5, and must be a whole number above 0"),
    "alpha that is no number": (keys(lora_alpha="16"), 'lora_alpha is "16", and must be a finite number'),
    "alpha that is not finite": (
        lambda f: (f / CONFIG).write_text(
            (f / CONFIG).read_text().replace('"lora_alpha": 6', '"lora_alpha": NaN')
        ),
        "is NaN",
    ),
    "ranks that are none": (
        keys(rank_pattern={"q_proj": "2"}),
        'rank_pattern is {"q_proj": "2"}, and must give whole numbers above 0',
    ),
    "a pattern that is none": (
        keys(alpha_pattern={"(": 2}),
        'alpha_pattern is {"(": 2}, and must give finite numbers by patterns',
    ),
    "another rank": (
        keys(r=8),
        f"{WEIGHTS}: {PREFIX}.0.mlp.down_proj.lora_A.weight has shape [4, 384], and should have [8, 384], "
        f"by rank 8 of {CONFIG}",
    ),
    "another rank by pattern": (
        keys(rank_pattern={"q_proj": 2}),
        f"{Q}.lora_A.weight has shape [4, 128], and should have [2, 128], by rank 2",
    ),
    "another width": (
        one(f"{Q}.lora_A.weight", lambda t: t[:, :-1]),
        f"{Q}.lora_A.weight has shape [4, 127], and should have [4, 128]",
    ),
    "another height": (
        one(f"{Q}.lora_B.weight", lambda t: t[:-1]),
        f"{Q}.lora_B.weight has shape [127, 4], and should have [128, 4]",
    ),
    "ranks that differ": (
        one(f"{Q}.lora_B.weight", lambda t: t[:, :2]),
        f"{Q}.lora_B.weight has shape [128, 2], and should have [128, 4]",
    ),
    "transposed": (
        one(f"{Q}.lora_A.weight", lambda t: t.T),
        f"{Q}.lora_A.weight has shape [128, 4], and should have [4, 128]",
    ),
    "flat": (
        one(f"{Q}.lora_A.weight", torch.flatten),
        f"{Q}.lora_A.weight has shape [512], and should have [4, 128]",
    ),
    "no elements": (
        each(lambda name, t: t[:0] if "lora_A" in name else t[:, :0]),
        "down_proj.lora_A.weight has shape [0, 384], and should have [4, 384]",
    ),
    "no tensors": (
        lambda f: save_file({"none": torch.zeros(0)}, f / WEIGHTS),
        "1 tensors that are no adapters",
    ),
    "nothing at all": (lambda f: save_file({}, f / WEIGHTS), f"{WEIGHTS} holds no adapters"),
    "A alone": (without(f"{Q}.lora_B.weight"), f"{Q}.lora_A.weight has no lora_B beside it"),
    "B alone": (without(f"{Q}.lora_A.weight"), f"{Q}.lora_B.weight has no lora_A beside it"),
    "a layer without tensors": (
        without(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"),
        f"target_modules of {CONFIG} names model.language_model.layers.0.self_attn.q_proj, of which "
        f"{WEIGHTS} has no tensors",
    ),
    "a layer that is not named": (
        keys(target_modules=["k_proj"]),
        "which target_modules of adapter_config.json does not name",
    ),
    "targets that are none": (
        keys(target_modules="("),
        'target_modules is "(", which is no regular expression',
    ),
    "not finite": (
        one(f"{Q}.lora_B.weight", lambda t: t.fill_(float("nan"))),
        f"{Q}.lora_B.weight holds values that are not finite",
    ),
    "infinite": (
        one(f"{Q}.lora_A.weight", lambda t: t.fill_(float("inf"))),
        f"{Q}.lora_A.weight holds values that are not finite",
    ),
    "whole numbers": (
        one(f"{Q}.lora_A.weight", lambda t: t.to(torch.int8)),
        f"{Q}.lora_A.weight is stored as int8",
    ),
    "8 bits": (
        one(f"{Q}.lora_A.weight", lambda t: t.to(torch.float8_e4m3fn)),
        f"{Q}.lora_A.weight is stored as float8_e4m3fn",
    ),
    "vision tower": (
        also(*(f"base_model.model.model.visual.blocks.0.attn.qkv.lora_{side}.weight" for side in "AB")),
        "2 tensors that are no adapters of the language model's linear layers, the first "
        "base_model.model.model.visual.blocks.0.attn.qkv",
    ),
    "head": (
        also(*(f"base_model.model.lm_head.lora_{side}.weight" for side in "AB")),
        "the first base_model.model.lm_head.lora_A.weight: merge it into its base with peft first.",
    ),
    "embedding": (also(f"{Q}.lora_embedding_A"), f"the first {Q}.lora_embedding_A"),
    "magnitudes": (also(f"{Q}.lora_magnitude_vector"), f"the first {Q}.lora_magnitude_vector"),
    "no prefix": (
        each_name(lambda name: name.removeprefix("base_model.model.")),
        "the first model.language_model.",
    ),
    "names of a run": (
        each_name(lambda name: name.replace(".weight", ".default.weight")),
        ".lora_A.default.weight",
    ),
    "cut short": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-3]),
        f"does not hold whole adapters: {WEIGHTS} cannot be read",
    ),
    "no weights": (
        lambda f: (f / WEIGHTS).unlink(),
        f"does not hold whole adapters: {WEIGHTS} cannot be read",
    ),
    "pickle": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        "adapter_model.bin is in pickle format, which is never loaded",
    ),
    "config that is no object": (
        lambda f: (f / CONFIG).write_text("5"),
        f"{CONFIG} cannot be read as the config of an adapter",
    ),
    "config that is no text": (
        lambda f: (f / CONFIG).write_bytes(b"\xff{}"),
        f"{CONFIG} cannot be read as the config of an adapter",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return saved_by_peft(tmp_path_factory.mktemp("saved") / "adapter", TINY_BASE)


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_peft_would_not_compute_so_are_refused(
    name: str, saved: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    spoil, sentence = REFUSED[name]
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    spoil(folder)
    monkeypatch.setattr(runtime, "load_source", None)
    assert (
        train.main(
            ["--preset", "tiny", "--model", str(folder), "--device", "cpu", "--out", str(tmp_path / "run")]
        )
        == 2
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert str(folder) in lines[0]
    assert sentence in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_rewrote_their_base_are_refused(start: str, tmp_path: Path, capsys) -> None:
    """As peft saves them: its own reading computes something far from the base plus their product."""
    folder = saved_by_peft(tmp_path / "adapter", TINY_BASE, init_lora_weights=start)
    plain = {**json.loads((folder / CONFIG).read_text()), "init_lora_weights": True}
    expected = by_peft(folder, TINY_BASE, torch.float32)  # peft does these in no other
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / CONFIG).write_text(json.dumps(plain))
    save_file(load_file(folder / WEIGHTS), tmp_path / "plain" / WEIGHTS)
    assert (last_logits(opened(tmp_path / "plain", out=None)) - expected).abs().max() > 1
    assert (
        train.main(
            ["--preset", "tiny", "--model", str(folder), "--device", "cpu", "--out", str(tmp_path / "run")]
        )
        == 2
    )
    assert f'init_lora_weights is "{start}"' in capsys.readouterr().err
