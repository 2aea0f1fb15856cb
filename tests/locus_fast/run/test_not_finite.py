"""NaN and infinity: named where they come in, kept out of what is written, and no numbers in what is
shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from locus_fast import evaluate, train
from locus_fast.errors import UserError
from locus_fast.run import saving
from locus_fast.run.pictures import draw_curve
from locus_fast.step.step import Step
from locus_fast.weights.checkpoint import TINY_BASE
from locus_fast.weights.finite import first_not_finite
from tests.locus_fast.run_cases import SHORT, rows_of, the_error


def spoiled_base(folder: Path, name: str, change) -> Path:
    """The base with `change` applied to one of its tensors, or to all for an empty name."""
    shutil.copytree(TINY_BASE, folder)
    tensors = load_file(folder / "model.safetensors")
    for key in [name] if name else tensors:
        tensors[key] = change(tensors[key])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def last_is(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


NAMES = sorted(load_file(TINY_BASE / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "value"),
    [(NAMES[0], float("nan")), (NAMES[len(NAMES) // 3], float("inf")), (NAMES[-1], float("-inf"))],
)
def test_a_weight_that_is_not_finite_is_named(name: str, value: float, tmp_path: Path, capsys) -> None:
    """By evaluation and by training, before a question is asked."""
    model = spoiled_base(tmp_path / "model", name, last_is(value))
    assert evaluate.main([str(model), "--eval-cues", "4", "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert f"{model}: {name} holds values that are not finite" in the_error(printed.err)
    assert not printed.out
    assert train.main([*SHORT, "--steps", "1", "--model", str(model), "--out", str(tmp_path / "run")]) == 2
    assert f"{name} holds values that are not finite" in the_error(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_finite_and_answer_nothing(tmp_path: Path, capsys) -> None:
    model = spoiled_base(tmp_path / "model", "", lambda tensor: tensor.float() * 1e30)
    assert evaluate.main([str(model), "--eval-cues", "4", "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert "log-probs that are not finite" in the_error(printed.err)
    assert not printed.out
    assert train.main([*SHORT, "--steps", "1", "--model", str(model), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_the_first_of_many_tensors() -> None:
    """Against PyTorch's own test of each element."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for _ in range(20):
            tensors = [
                torch.randn(int(torch.randint(0, 50, (), generator=generator)), generator=generator).to(dtype)
                for _ in range(6)
            ]
            for tensor in tensors:
                if len(tensor) and torch.rand((), generator=generator) < 0.2:
                    tensor[len(tensor) // 2] = (
                        float("nan") if torch.rand((), generator=generator) < 0.5 else float("inf")
                    )
            expected = next((str(i) for i, tensor in enumerate(tensors) if not tensor.isfinite().all()), None)
            assert first_not_finite((str(i), tensor) for i, tensor in enumerate(tensors)) == expected
    assert first_not_finite([("whole", torch.tensor([1]))]) is None
    assert (
        first_not_finite([("largest", torch.full((3,), torch.finfo(torch.float64).max, dtype=torch.float64))])
        is None
    )


def of_final(run: Path) -> dict[str, torch.Tensor]:
    """The weights that plain transformers reads from `final/`."""
    model = AutoModelForImageTextToText.from_pretrained(run / "final", dtype=torch.float32)
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


@pytest.mark.parametrize("steps", ["1", "8"])
def test_final_of_a_run_that_diverged_at_once_is_the_base(steps: str, tmp_path: Path, capsys) -> None:
    """Whether it ended by its dropped steps or before one was seen."""
    out = tmp_path / "run"
    assert train.main([*SHORT, "--steps", steps, "--lr", "1e30", "--out", str(out)]) == 2
    printed = capsys.readouterr().err
    assert f"{out / 'final'} holds the base" in the_error(printed)
    assert ("not finite in 5 steps in a row up to step 6" in printed) == (steps == "8")
    base = AutoModelForImageTextToText.from_pretrained(TINY_BASE, dtype=torch.float32).state_dict()
    final = of_final(out)
    assert all(torch.equal(final[name], base[name]) for name in final)
    assert not list((out / "checkpoints").iterdir())


def test_final_of_a_run_that_diverged_later_is_its_last_good_checkpoint(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    """Checkpoints are due after each step; the third step leaps."""
    call = Step.__call__

    def leaping(step, prompts, index, began, stop):
        numbers = call(step, prompts, index, began, stop)
        if index == 2:
            with torch.no_grad():
                for p in step.engine.model.parameters():
                    p.mul_(1e30)
        return numbers

    monkeypatch.setattr(Step, "__call__", leaping)
    out = tmp_path / "run"
    assert train.main([*SHORT, "--steps", "20", "--save-every", "1", "--out", str(out)]) == 2
    error = the_error(capsys.readouterr().err)
    assert "5 steps in a row up to step 8" in error
    assert f"{out / 'final'} holds that of step 2" in error
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-000001", "step-000002"]
    final, saved = of_final(out), load_file(out / "checkpoints" / "step-000002" / "model.safetensors")
    assert all(
        torch.equal(tensor, load_file(out / "final" / "model.safetensors")[name])
        for name, tensor in saved.items()
    )
    assert all(tensor.isfinite().all() for tensor in final.values())
    monkeypatch.setattr(Step, "__call__", call)
    assert train.main(["--resume", str(out), "--steps", "3"]) == 0  # as the sentence says
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3]


def test_a_stopped_run_writes_no_weights_that_are_not_finite(tmp_path: Path, monkeypatch, capsys) -> None:
    """Stopped by an error after the step that spoiled one weight; the sentence names it."""
    call = Step.__call__

    def spoiling(step, prompts, index, began, stop):
        if index == 1:
            raise UserError("the disk went away.")
        numbers = call(step, prompts, index, began, stop)
        with torch.no_grad():
            step.engine.model.model.language_model.layers[0].mlp.up_proj.weight[3, 4] = float("nan")
        return numbers

    monkeypatch.setattr(Step, "__call__", spoiling)
    out = tmp_path / "run"
    assert train.main([*SHORT, "--steps", "4", "--out", str(out)]) == 2
    error = the_error(capsys.readouterr().err)
    assert "the disk went away." in error
    assert "the weight model.language_model.layers.0.mlp.up_proj.weight is not finite" in error
    assert all(tensor.isfinite().all() for tensor in of_final(out).values())


def test_adapters_that_diverged(tmp_path: Path, capsys) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "run"
    options = ["--lora", "4", "--export", "adapter", "--steps", "3", "--lr", "1e30"]
    assert train.main([*SHORT, *options, "--out", str(out)]) == 2
    assert "holds the base" in the_error(capsys.readouterr().err)
    adapters = load_file(out / "final" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapters.values())
    # their product is 0
    assert not any(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)


def test_a_run_is_saved_where_there_is_no_memory_to_probe_it(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(saving, "prefill", full)
    assert train.main([*SHORT, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert of_final(tmp_path / "run")


def test_a_dropped_step_shows_no_gradient(tmp_path: Path, monkeypatch, capsys) -> None:
    """Neither in the bar, which counts it, nor in the metrics, the events or the curve."""
    backward = Step._backward

    def spoiled(step, hidden, experience, totals):
        return backward(step, hidden * float("nan"), experience, totals)

    monkeypatch.setattr(Step, "_backward", spoiled)
    out = tmp_path / "run"
    pytest.importorskip("tensorboard")
    assert train.main([*SHORT, "--steps", "2", "--tensorboard", "true", "--out", str(out)]) == 0
    rows = rows_of(out)  # which refuses NaN
    assert [(row["grad_norm"], row["dropped_step"]) for row in rows] == [(None, True)] * 2
    printed = capsys.readouterr().err
    assert "grad=-, dropped=2" in printed
    assert "grad=0.000" not in printed
    with Image.open(out / "curve.png") as picture:
        assert picture.width > 500


def test_a_policy_that_is_not_finite_shows_no_gradient(tmp_path: Path, capsys) -> None:
    """Its replies earn nothing, so there is no gradient at all; that is no gradient of 0."""
    out = tmp_path / "run"
    assert train.main([*SHORT, "--steps", "3", "--lr", "1e30", "--out", str(out)]) == 2
    rows = rows_of(out)
    assert [row["dropped_step"] for row in rows] == [False, True, True]
    assert rows[0]["grad_norm"] > 0
    assert [row["grad_norm"] for row in rows[1:]] == [None, None]
    printed = capsys.readouterr().err
    assert "grad=-, dropped=1" in printed
    assert "grad=0.000" not in printed


def test_a_curve_of_lines_without_figures(tmp_path: Path) -> None:
    row = {"step": 1, "reward": 0.5, "iou": 0.4, "valid": 1.0, "kl": 0.01, "grad_norm": 0.3}
    lines = [row, {**row, "step": 2, "grad_norm": None, "kl": None}, {"step": 3}, {**row, "step": 4}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width > 500
