"""A --model that holds adapters: trained further, kept under new ones, or merged. What is written computes
what was trained, by plain peft and by plain transformers, and the reference policy is the model as it was
given."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from locus_fast import evaluate, train
from locus_fast.model.adapters import adapters_off
from locus_fast.weights.checkpoint import TINY_BASE, save_adapters, save_model
from tests.locus_fast.adapter_cases import (
    CPU,
    SHORT,
    by_peft,
    last_logits,
    logits_by_transformers,
    logprobs,
    opened,
    rows,
    saved_by_peft,
    scatter,
)
from tests.published import write_checkpoint

peft = pytest.importorskip("peft")
RUN = [*(word for word in SHORT if word not in ("--lora", "8")), "--steps", "2"]  # SHORT without its adapters


# The oracles compute in float64: at logits of 17 float32 alone is off by 6e-5.


def by_transformers(folder: Path) -> torch.Tensor:
    return logits_by_transformers(
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    )[-1]


UNEVEN = {"rank_pattern": {r"layers.1.self_attn.q_proj": 2, "down_proj": 3}, "alpha_pattern": {"up_proj": 20}}
GIVEN = {
    "all layers alike": {},
    "some layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0]},
    "ranks and scales by pattern": {**UNEVEN, "use_rslora": True},
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("family", ["tiny", "qwen2.5-vl"])
def test_adapters_on_adapters_are_written_as_one(family: str, given: str, tmp_path: Path) -> None:
    """And peft computes with it what was trained, as transformers does with the merged model."""
    base = TINY_BASE if family == "tiny" else write_checkpoint(tmp_path / "base", family)
    one = saved_by_peft(tmp_path / "one", base, **GIVEN[given])
    model = opened(one, "--lora", "8")
    assert (last_logits(model) - by_peft(one, base)).abs().max() <= 1e-4
    scatter(model, seed=1)
    assert (last_logits(model) - by_peft(one, base)).abs().max() > 0.1
    save_adapters(model, str(base), tmp_path / "adapter")
    save_model(model, base, tmp_path / "merged", torch.float32)
    assert (by_peft(tmp_path / "adapter", base) - last_logits(model)).abs().max() <= 1e-4
    assert (by_transformers(tmp_path / "merged") - last_logits(model)).abs().max() <= 1e-4
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {file.name for file in base.iterdir()}
    assert (last_logits(opened(tmp_path / "adapter", out=None)) - last_logits(model)).abs().max() <= 1e-4


@pytest.mark.parametrize("given", GIVEN)
def test_adapters_trained_further_keep_ranks_and_scales(given: str, tmp_path: Path) -> None:
    one = saved_by_peft(tmp_path / "one", TINY_BASE, **GIVEN[given])
    model = opened(one)
    assert (last_logits(model) - by_peft(one, TINY_BASE)).abs().max() <= 1e-4
    scatter(model, seed=1)
    save_adapters(model, str(TINY_BASE), tmp_path / "two")
    shapes = [
        {name: t.shape for name, t in load_file(folder / "adapter_model.safetensors").items()}
        for folder in (one, tmp_path / "two")
    ]
    assert shapes[0] == shapes[1]
    assert (by_peft(tmp_path / "two", TINY_BASE) - last_logits(model)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "options", [[], ["--lora", "8"], ["--quantize", "nf4"], ["--lora", "8", "--quantize", "nf4"]]
)
def test_the_reference_is_the_model_as_it_was_given(options: list[str], tmp_path: Path) -> None:
    """To the bit, whatever is trained."""
    if "nf4" in options:
        pytest.importorskip("bitsandbytes")
    model = opened(
        saved_by_peft(tmp_path / "one", TINY_BASE, **GIVEN["ranks and scales by pattern"]), *options
    )
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    with torch.no_grad():
        before = logprobs(model)
        scatter(model, seed=1)
        moved = logprobs(model)
        assert (moved - before).abs().max() > 0.1
        with adapters_off(model) as reference:
            assert torch.equal(logprobs(reference), before)
        assert torch.equal(logprobs(model), moved)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A run whose final/ holds adapters."""
    out = tmp_path_factory.mktemp("runs") / "one"
    assert train.main([*SHORT, "--export", "adapter", "--out", str(out)]) == 0
    return out


def ended(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())["eval"]["after"]


def asked(folder: Path, capsys) -> dict:
    """What `evaluate` prints of a folder, asked as the runs here ask."""
    capsys.readouterr()
    assert (
        evaluate.main(["--model", str(folder), "--preset", "tiny", "--eval-cues", "12", "--device", "cpu"])
        == 0
    )
    return {
        name: value for name, value in json.loads(capsys.readouterr().out).items() if name != "skipped_images"
    }


VARIANTS = {
    "further": [],
    "further over 4 bits": ["--quantize", "nf4"],
    "stacked": ["--lora", "4"],
    "stacked over 4 bits": ["--lora", "4", "--quantize", "nf4"],
}


@pytest.mark.parametrize("export", ["adapter", "merged"])
@pytest.mark.parametrize("variant", ["further", "stacked"])
def test_what_a_run_on_adapters_writes_answers_as_the_run_did(
    variant: str, export: str, one: Path, tmp_path: Path, capsys
) -> None:
    run, base = tmp_path / "run", str(TINY_BASE.resolve())
    assert (
        train.main(
            [
                *RUN,
                *VARIANTS[variant],
                "--model",
                str(one / "final"),
                "--export",
                export,
                "--out",
                str(run),
                "--save-every",
                "1",
            ]
        )
        == 0
    )
    said = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith(f"{one / 'final'}: its 28 adapters of rank 8 ")
    ]
    assert len(said) == 1
    assert ("trained further" if variant == "further" else "new ones of rank 4") in said[0]
    metrics = rows(run)
    assert metrics[0]["kl"] == 0 < metrics[-1]["kl"]
    start = json.loads((run / "summary.json").read_text())["eval"]["before"]
    assert start == ended(one)
    assert ended(run) != start
    assert asked(run / "final", capsys) == ended(run)
    last = run / "checkpoints" / "step-000002"
    assert asked(last, capsys) == ended(run)
    expected = by_peft(last, TINY_BASE)
    assert (last_logits(opened(last, out=None)) - expected).abs().max() <= 1e-4
    final = by_peft(run / "final", TINY_BASE) if export == "adapter" else by_transformers(run / "final")
    assert (final - expected).abs().max() <= 1e-4
    for folder in (last, *([run / "final"] if export == "adapter" else [])):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["base_model_name_or_path"]) == (8 if variant == "further" else 12, base)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_on_adapters_is_resumed_as_one_in_one_go(variant: str, one: Path, tmp_path: Path) -> None:
    if "4 bits" in variant:
        pytest.importorskip("bitsandbytes")
    whole, half = tmp_path / "whole", tmp_path / "half"
    options = [*RUN, *VARIANTS[variant], "--model", str(one / "final"), "--export", "adapter"]
    assert train.main([*options, "--out", str(whole), "--save-every", "1"]) == 0
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step-000002")
    assert train.main(["--resume", str(half)]) == 0
    assert rows(half) == rows(whole)
    ours, theirs = (load_file(run / "final" / "adapter_model.safetensors") for run in (half, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_over_other_adapters_is_not_resumed(one: Path, tmp_path: Path, capsys) -> None:
    given, run = tmp_path / "given", tmp_path / "run"
    shutil.copytree(one / "final", given)
    assert (
        train.main([*RUN, "--lora", "4", "--model", str(given), "--out", str(run), "--save-every", "1"]) == 0
    )
    shutil.rmtree(run / "checkpoints" / "step-000002")
    file = given / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert train.main(["--resume", str(run)]) == 2
    assert "was saved over other adapters than --model holds now" in capsys.readouterr().err


def test_merge_trains_all_weights(one: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    arguments = [*RUN, "--lr", "1e-4", "--model", str(one / "final"), "--merge", "true", "--out", str(run)]
    assert train.main(arguments) == 0
    assert "are merged, and all weights trained" in capsys.readouterr().err
    assert rows(run)[0]["kl"] == 0
    assert {file.name for file in (run / "final").iterdir()} == {file.name for file in TINY_BASE.iterdir()}
    before, after = (load_file(folder / "model.safetensors") for folder in (TINY_BASE, run / "final"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("visual" in name for name in moved)
    assert asked(run / "final", capsys) == ended(run)
    assert train.main(["--resume", str(run), "--steps", "3", "--merge", "false"]) == 2
    assert "--merge cannot be changed with --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--merge", "true", "--lora", "4"], "--merge trains all weights, and --lora adapters alone"),
        (["--merge", "true", "--export", "adapter"], "--export adapter needs --lora"),
        (["--merge", "true", "--quantize", "nf4"], "--quantize nf4 needs --lora"),
        (["--reference", "nf4"], "--reference nf4: with --lora"),
    ],
)
def test_options_that_do_not_go_with_adapters_in_the_model(
    options: list[str], sentence: str, one: Path, tmp_path: Path, capsys
) -> None:
    assert train.main([*RUN, "--model", str(one / "final"), "--out", str(tmp_path / "run"), *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [["--merge", "true"], ["--merge", "true", "--model", str(TINY_BASE)]])
def test_merge_needs_adapters(options: list[str], tmp_path: Path, capsys) -> None:
    assert train.main([*RUN, "--out", str(tmp_path / "run"), *options]) == 2
    assert re.search(r"--merge: .* holds no adapters", capsys.readouterr().err)


def test_dropout_that_is_left_off_is_said(tmp_path: Path, capsys) -> None:
    given = saved_by_peft(tmp_path / "one", TINY_BASE, lora_dropout=0.25)
    assert train.main([*RUN, "--steps", "1", "--model", str(given), "--out", str(tmp_path / "run")]) == 0
    assert "trained further without their dropout of 0.25" in capsys.readouterr().err


def test_adapters_of_bfloat16_are_trained_in_float32(tmp_path: Path) -> None:
    given = saved_by_peft(tmp_path / "one", TINY_BASE)
    file = given / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    model = opened(given)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert next(model.parameters()).device == CPU
    assert (last_logits(model) - by_peft(given, TINY_BASE)).abs().max() <= 1e-4


@pytest.mark.parametrize("held", ["folder", "hub"])
def test_what_is_written_names_the_base_and_not_the_adapters(held: str, tmp_path: Path, monkeypatch) -> None:
    """A base on the hub by its id, whether the adapters were found in a folder or on the hub themselves."""
    given = saved_by_peft(tmp_path / "one", TINY_BASE)
    config = json.loads((given / "adapter_config.json").read_text())
    (given / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "someone/base"})
    )
    folders = {"someone/base": TINY_BASE, "someone/adapters": given}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(folders[name]))
    model = str(given) if held == "folder" else "someone/adapters"
    options = ["--preset", "tiny", "--model", model, "--export", "adapter", "--steps", "1"]
    assert train.main([*RUN, *options, "--out", str(tmp_path / "run")]) == 0
    written = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "someone/base"
