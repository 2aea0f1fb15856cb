"""The plan of a run from byte counts, and what an out-of-memory error does to a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locus_fast import train
from locus_fast.run import evaluation
from locus_fast.step import optim, step
from locus_fast.step.step import Step
from locus_fast.weights.checkpoint import TINY_BASE

SHORT = ["--prompts", "6", "--eval-cues", "6", "--device", "cpu"]


BACKWARD = Step._backward


class OutOfMemory:
    """A function, by default the trainer's backward, that at given calls does its work and then finds no
    memory."""

    def __init__(self, *calls: int, of=BACKWARD):
        self.function, self.calls, self.count = of, calls, 0

    def __call__(self, *arguments):
        self.count += 1
        result = self.function(*arguments)
        if self.count in self.calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return result


def method(call: OutOfMemory):
    """As a method of a class; an object with `__call__` alone would not be given the instance."""
    return lambda *arguments: call(*arguments)


def numbers(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_out_of_memory_halves_the_budget_and_loses_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    assert (
        train.main([*SHORT, "--steps", "2", "--microbatch-tokens", "700", "--out", str(tmp_path / "narrow")])
        == 0
    )
    monkeypatch.setattr(Step, "_backward", method(OutOfMemory(2)))
    assert (
        train.main([*SHORT, "--steps", "2", "--microbatch-tokens", "1400", "--out", str(tmp_path / "halved")])
        == 0
    )
    assert "out of memory: the step is done again in microbatches of 700 tokens" in capsys.readouterr().err
    assert json.loads((tmp_path / "halved" / "summary.json").read_text())["plan"]["halved"]
    for narrow, halved in zip(numbers(tmp_path / "narrow"), numbers(tmp_path / "halved"), strict=True):
        for name in (
            "reward",
            "iou",
            "loss",
            "kl",
            "grad_norm",
            "reply_tokens",
            "zero_variance_groups",
            "flops",
            "fill",
        ):
            assert halved[name] == pytest.approx(narrow[name], rel=1e-4, abs=1e-7), name
    ours, theirs = (
        load_file(tmp_path / name / "final" / "model.safetensors") for name in ("halved", "narrow")
    )
    base = load_file(TINY_BASE / "model.safetensors")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-6)
    assert any((value - base[name].float()).abs().max() > 1e-4 for name, value in theirs.items())


def test_out_of_memory_that_halving_does_not_mend(tmp_path: Path, monkeypatch, capsys) -> None:
    """A second error: saved, and one sentence."""
    monkeypatch.setattr(Step, "_backward", method(OutOfMemory(2, 4)))
    assert (
        train.main([*SHORT, "--steps", "2", "--microbatch-tokens", "1400", "--out", str(tmp_path / "run")])
        == 2
    )
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "the device ran out of memory" in error[0]
    assert "lower --microbatch-tokens (now" in error[0]
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("rollout_tokens", ["0", "900"])
def test_a_prompt_larger_than_the_halved_budget_rides_alone(
    rollout_tokens: str, tmp_path: Path, monkeypatch
) -> None:
    assert (
        train.main([*SHORT, "--steps", "1", "--microbatch-tokens", "450", "--out", str(tmp_path / "whole")])
        == 0
    )
    monkeypatch.setattr(Step, "_backward", method(OutOfMemory(1)))
    arguments = [*SHORT, "--steps", "1", "--microbatch-tokens", "450", "--rollout-tokens", rollout_tokens]
    assert train.main([*arguments, "--out", str(tmp_path / "halved")]) == 0
    assert json.loads((tmp_path / "halved" / "summary.json").read_text())["plan"]["halved"]
    (whole,), (halved,) = numbers(tmp_path / "whole"), numbers(tmp_path / "halved")
    for name in ("reward", "loss", "grad_norm"):
        assert halved[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-7)


def test_a_further_update_is_halved_too(tmp_path: Path, monkeypatch, capsys) -> None:
    """Against the stored log-probs, which go with their groups: the run is the one with narrow
    microbatches."""
    arguments = [*SHORT, "--steps", "1", "--updates-per-batch", "3", "--lr", "1e-3", "--kl-coef", "0.1"]
    assert train.main([*arguments, "--microbatch-tokens", "1400", "--out", str(tmp_path / "whole")]) == 0
    calls = OutOfMemory()
    monkeypatch.setattr(Step, "_backward", method(calls))
    assert train.main([*arguments, "--microbatch-tokens", "1400", "--out", str(tmp_path / "counted")]) == 0
    first = calls.count // 3  # microbatches an update
    capsys.readouterr()
    monkeypatch.setattr(Step, "_backward", method(OutOfMemory(first + 2)))
    assert train.main([*arguments, "--microbatch-tokens", "1400", "--out", str(tmp_path / "halved")]) == 0
    assert "out of memory: the step is done again in microbatches of 700 tokens" in capsys.readouterr().err
    (whole,), (halved,) = numbers(tmp_path / "whole"), numbers(tmp_path / "halved")
    for name in ("reward", "loss", "kl", "grad_norm", "ratio_max", "clip_low", "clip_high", "flops"):
        assert halved[name] == pytest.approx(whole[name], rel=2e-3, abs=1e-5), name
    ours, theirs = (
        load_file(tmp_path / name / "final" / "model.safetensors") for name in ("halved", "whole")
    )
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-4)


@pytest.mark.parametrize("failures", [1, 2])
def test_the_optimizers_step_without_memory(failures: int, tmp_path: Path, monkeypatch, capsys) -> None:
    """Nothing has moved when it is found out: once more without the decoder's buffers, which changes nothing;
    else the steps before it are saved."""
    assert (
        train.main([*SHORT, "--steps", "2", "--microbatch-tokens", "1400", "--out", str(tmp_path / "plain")])
        == 0
    )
    monkeypatch.setattr(optim, "reserve", OutOfMemory(*range(2, 2 + failures), of=optim.reserve))
    code = train.main(
        [*SHORT, "--steps", "2", "--microbatch-tokens", "1400", "--out", str(tmp_path / "short")]
    )
    ours, theirs = numbers(tmp_path / "short"), numbers(tmp_path / "plain")
    assert ours[0]["grad_norm"] == theirs[0]["grad_norm"]
    weights = load_file(tmp_path / "short" / "final" / "model.safetensors")
    if failures == 1:
        assert code == 0
        assert ours[1]["grad_norm"] == theirs[1]["grad_norm"]
        assert all(
            torch.equal(weights[name], value)
            for name, value in load_file(tmp_path / "plain" / "final" / "model.safetensors").items()
        )
        return
    assert code == 2
    assert (
        "the optimizer's step found no memory: hold the reference in fewer bytes (--reference nf4 or host)"
        in capsys.readouterr().err
    )
    assert [path.name for path in (tmp_path / "short" / "checkpoints").iterdir()] == ["step-000001"]
    assert train.main(["--resume", str(tmp_path / "short"), "--reference", "host"]) == 0
    weights = load_file(tmp_path / "short" / "final" / "model.safetensors")
    assert all(
        torch.equal(weights[name], value)
        for name, value in load_file(tmp_path / "plain" / "final" / "model.safetensors").items()
    )


@pytest.mark.parametrize(("calls", "code"), [((1,), 0), ((1, 2), 2)])
def test_answering_without_memory(
    calls: tuple[int, ...], code: int, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(evaluation, "prefill", OutOfMemory(*calls, of=evaluation.prefill))
    assert (
        train.main([*SHORT, "--steps", "1", "--microbatch-tokens", "1400", "--out", str(tmp_path / "run")])
        == code
    )
    error = capsys.readouterr().err
    assert "out of memory: answering is done again in microbatches of 700 tokens" in error
    assert (
        "error: the device ran out of memory again, after the budget of a microbatch was halved: lower "
        "--microbatch-tokens" in error
    ) == (code == 2)
    assert (tmp_path / "run").exists() == (code == 0)


def test_out_of_memory_before_the_first_step(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(step, "make_reference", OutOfMemory(1, of=step.make_reference))
    assert train.main([*SHORT, "--steps", "1", "--out", str(tmp_path / "run")]) == 2
    assert "error: the device ran out of memory: hold the reference in fewer bytes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
