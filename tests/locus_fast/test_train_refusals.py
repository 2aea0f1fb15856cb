"""What the command refuses: one sentence each, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from locus_fast import train
from locus_fast.weights.checkpoint import TINY_BASE
from tests.locus_fast.run_cases import SMALL as SHORT


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--stepz", "3"], "--stepz"),
        (["--steps", "three"], "three"),
        (["--preset", "huge"], "--preset must be one of tiny"),
        (["--reward", "magic"], "magic"),
        (["--group-size", "1"], "--group-size must be at least 2"),
        (["--data", "nowhere.json"], "nowhere.json"),
        (["--images", "photos"], "--images was given without --data"),
        (["--model", "./nowhere"], "--model ./nowhere: there is no such folder"),
        (["--microbatch-tokens", "100"], "raise --microbatch-tokens"),
        (["--preset", "paper", "--model", str(TINY_BASE)], "--data is missing"),
        (["--seed", "9" * 30], "--seed must be"),
        (["--lr", "inf"], "--lr cannot be inf"),
        (["--mix", "inf", "1", "1"], "--mix cannot be"),
        (["--min-side", "20"], "--min-side needs --data"),
        (["--device", "tpu"], "--device must be auto, cpu or cuda"),
        (["--normalize-std", "maybe"], "true or false"),
        (
            ["--attention", "flash_attn_2"],
            "--attention flash_attn_2: attention backend 'flash_attn_2' cannot be used",
        ),
        (["--attention", "magic"], "magic"),
        (["--lr-scale", "0", "0", "0"], "--lr-scale must be three shares"),
        (["--dtype", "bfloat16", "--optimizer", "adamw"], "rounds small steps of bfloat16 weights away"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main([*SHORT, "--out", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    last = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(last) == 1


def test_an_output_folder_that_exists(tmp_path: Path, capsys) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    assert train.main([*SHORT, "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path} exists already" in capsys.readouterr().err
    assert (tmp_path / "keep.txt").read_text() == "mine"


def halve(weights: Path) -> None:
    """Half of the tensors."""
    tensors = load_file(weights)
    save_file({name: tensors[name] for name in sorted(tensors)[::2]}, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickle format"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100), "no whole safetensors file"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{}"), "image_mean"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "(there is none): copy the base model's"),
        (lambda folder: halve(folder / "model.safetensors"), "tensors are in none of its weight files"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "llama"),
    ],
)
def test_model_folders_that_cannot_be_used(spoil, sentence: str, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in TINY_BASE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    spoil(folder)
    assert (
        train.main([*SHORT, "--preset", "tiny", "--model", str(folder), "--out", str(tmp_path / "run")]) == 2
    )
    error = capsys.readouterr().err
    assert sentence in error
    assert not (tmp_path / "run").exists()
