"""Runs that end early or cannot begin: what is kept, and what is said."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locus_fast import train
from locus_fast.errors import UserError
from locus_fast.step.step import Step
from locus_fast.weights.checkpoint import TINY_BASE
from tests.locus_fast.metrics_cases import timeless
from tests.locus_fast.run_cases import SMALL as SHORT


def test_what_cannot_be_resumed(tmp_path: Path, capsys) -> None:
    """And that nothing of the folder is touched."""
    assert train.main(["--resume", str(tmp_path)]) == 2
    assert f"{tmp_path / 'config.json'} cannot be read" in capsys.readouterr().err
    for text, sentence in (
        ("[]", "no checkpoint"),
        ("{}", "no checkpoint"),
        ('{"steps": "x"}', "--steps cannot be 'x'"),
        ('{"question": "why"}', "--prompt-style must be"),
    ):
        (tmp_path / "config.json").write_text(text)
        assert train.main(["--resume", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert "Traceback" not in error
        assert (tmp_path / "config.json").read_text() == text
    assert train.main(["--resume", str(tmp_path), "--out", str(tmp_path / "other")]) == 2
    assert "--out cannot be changed with --resume" in capsys.readouterr().err


def test_a_failed_start_leaves_no_folder(tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert train.main([*SHORT, "--microbatch-tokens", "10", "--out", str(out)]) == 2
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert train.main([*SHORT, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_diverged_policy_ends_the_run(tmp_path: Path, capsys) -> None:
    assert train.main([*SHORT, "--steps", "12", "--lr", "1e30", "--out", str(tmp_path / "run")]) == 2
    assert "were not finite in 5 steps in a row" in capsys.readouterr().err


def test_an_error_in_mid_run_loses_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    call = Step.__call__

    def failing(step, prompts, index, began, stop):
        if index == 2:
            raise UserError("the disk went away.")
        return call(step, prompts, index, began, stop)

    monkeypatch.setattr(Step, "__call__", failing)
    out = tmp_path / "run"
    assert train.main([*SHORT, "--out", str(out)]) == 2
    assert "error: the disk went away." in capsys.readouterr().err
    assert (out / "checkpoints" / "step-000002" / "model.safetensors").exists()
    assert (out / "final" / "model.safetensors").exists()


def test_steps_that_are_not_finite_are_dropped_and_end_the_run(tmp_path: Path, monkeypatch, capsys) -> None:
    backward = Step._backward

    def spoiled(step, hidden, experience, totals):
        return backward(step, hidden * float("nan"), experience, totals)

    monkeypatch.setattr(Step, "_backward", spoiled)
    out = tmp_path / "run"
    assert train.main([*SHORT, "--out", str(out), "--steps", "9"]) == 2
    assert "not finite in 5 steps in a row up to step 5" in capsys.readouterr().err
    assert all(row["dropped_step"] for row in timeless(out / "metrics.jsonl"))
    before, after = (load_file(folder / "model.safetensors") for folder in (TINY_BASE, out / "final"))
    assert all(torch.equal(before[name].float(), after[name]) for name in before)


def test_ctrl_c_saves_what_was_done(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [sys.executable, "-m", "locus_fast.train", *SHORT, "--steps", "500", "--out", str(out)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= 2
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    steps = len((out / "metrics.jsonl").read_text().splitlines())
    summary = json.loads((out / "summary.json").read_text())
    assert summary["interrupted"]
    assert summary["steps"] == steps >= 2
    assert (out / "final" / "model.safetensors").exists()
    assert (
        json.loads((out / "checkpoints" / f"step-{steps:06d}" / "optimizer" / "step.json").read_text())[
            "step"
        ]
        == steps
    )


@pytest.mark.parametrize("seconds", [0.5, 1.5, 6.0])
def test_ctrl_c_while_starting(seconds: float, tmp_path: Path) -> None:
    arguments = [
        sys.executable,
        "-m",
        "locus_fast.train",
        *SHORT,
        "--steps",
        "500",
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
