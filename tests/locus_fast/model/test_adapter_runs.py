"""Whole runs that train adapters: metrics, resuming, variants."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locus_fast import evaluate, train
from locus_fast.weights.checkpoint import TINY_BASE
from tests.locus_fast.adapter_cases import (
    SHORT,
    needs_peft,
    rows,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lora"
    assert train.main([*SHORT, "--out", str(out), "--save-every", "2"]) == 0
    return out


@needs_peft
def test_a_run(run: Path) -> None:
    """The first step's policy is its reference; then it moves. What was not adapted is the base's, to the
    bit."""
    metrics = rows(run)
    assert len(metrics) == 3
    assert metrics[0]["kl"] == 0 < metrics[-1]["kl"]
    assert not any(row["dropped_step"] for row in metrics)
    assert {file.name for file in (run / "checkpoints" / "step-000002").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer",
    }
    before, after = (load_file(folder / "model.safetensors") for folder in (TINY_BASE, run / "final"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        name for name in before if "language_model.layers" in name and name.endswith("_proj.weight")
    }


@needs_peft
def test_resuming_gives_the_same_run(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / "step-000003")
    assert train.main(["--resume", str(out)]) == 0
    assert rows(out) == rows(run)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (out, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert train.main(["--resume", str(out), "--lora", "4"]) == 2
    assert "--lora cannot be changed with --resume" in capsys.readouterr().err


@needs_peft
@pytest.mark.parametrize(
    "more", [["--export", "adapter"], ["--quantize", "nf4", "--optimizer", "bnb-adamw8bit"]]
)
def test_variants_run_and_are_evaluated(more: list[str], run: Path, tmp_path: Path, capsys) -> None:
    """`evaluate` on `final`, adapters or merged, gives what the run ended with."""
    if "nf4" in more:
        pytest.importorskip("bitsandbytes")
    assert train.main([*SHORT, "--out", str(tmp_path / "run"), "--checkpointing", "1", *more]) == 0
    metrics = rows(tmp_path / "run")
    assert metrics[0]["kl"] == 0 < metrics[-1]["kl"]
    if "nf4" not in more:
        assert metrics[0]["reward"] == rows(run)[0]["reward"]
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "run" / "final"), "--device", "cpu"]) == 0
    expected = json.loads((tmp_path / "run" / "summary.json").read_text())["eval"]["after"]
    assert json.loads(capsys.readouterr().out) == {**expected, "skipped_images": 0}


@needs_peft
def test_a_checkpoint_of_another_rank(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**settings, "lora": 4, "steps": 4}))
    assert train.main(["--resume", str(out)]) == 2
    assert (
        "step-000003 was trained with --lora 8, whose tensors are not those of --lora 4: set lora to 8 in "
        "its config.json" in capsys.readouterr().err
    )
    note = out / "checkpoints" / "step-000003" / "optimizer" / "step.json"
    note.write_text('{"step": 3}')  # as one that does not say what it was trained with
    assert train.main(["--resume", str(out)]) == 2
    error = capsys.readouterr().err
    assert "is not a whole checkpoint" in error
    assert "has shape" in error


@needs_peft
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantized", [[], ["--quantize", "nf4"]])
def test_a_run_on_cuda(quantized: list[str], tmp_path: Path) -> None:
    """With the decoder's graphs, bfloat16 weights, and 4-bit layers by bitsandbytes' CUDA kernels."""
    if quantized:
        pytest.importorskip("bitsandbytes")
    arguments = [
        *SHORT,
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cuda",
        "--dtype",
        "bfloat16",
        *quantized,
    ]
    assert train.main(arguments) == 0
    metrics = rows(tmp_path / "run")
    assert not any(row["dropped_step"] for row in metrics)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-4)
