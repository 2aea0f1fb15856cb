"""The command as a user runs it: a short run, its folder, its exported model in plain transformers,
determinism, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from locus_fast import evaluate, train
from locus_fast.config import Config, parse
from locus_fast.model.packing import PromptBatch
from locus_fast.model.policy import prefill
from locus_fast.run.setup import set_up
from locus_fast.step.rollout import Rollout
from locus_fast.step.scoring import Scoring
from locus_fast.step.step import Step
from locus_fast.weights.checkpoint import TINY_BASE
from tests.locus_fast.metrics_cases import timeless
from tests.locus_fast.run_cases import SMALL as SHORT


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "short"
    assert train.main([*SHORT, "--out", str(out), "--save-every", "2", "--tensorboard", "true"]) == 0
    return out


def test_the_run_folder(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "curve.png",
        "samples.png",
        "summary.json",
        "checkpoints",
        "final",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000002", "step-000003"}
    summary = json.loads((run / "summary.json").read_text())
    for when in ("before", "after"):
        assert summary["eval"][when]["n"] == 12
        assert {"mean_iou", "acc50", "acc75", "valid", "by_size"} <= summary["eval"][when].keys()
    assert summary["rollouts_per_s"] > 0
    assert summary["unique_tokens_per_s"] > summary["rollouts_per_s"]
    assert (
        Config(
            **{
                k: tuple(v) if isinstance(v, list) else v
                for k, v in json.loads((run / "config.json").read_text()).items()
            }
        ).steps
        == 3
    )
    rows = timeless(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["logprob_mismatch_max"] < 1e-4 for row in rows)
    assert all(row["ratio_max"] == 1 for row in rows)
    with Image.open(run / "samples.png") as picture:
        assert picture.width > 500


def test_weights_moved_and_the_layout_stayed(run: Path) -> None:
    assert {path.name for path in (run / "final").iterdir()} == {path.name for path in TINY_BASE.iterdir()}
    before, after = (load_file(folder / "model.safetensors") for folder in (TINY_BASE, run / "final"))
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name].float(), after[name]) for name in before) > 0.8 * len(before)
    assert (run / "final" / "tokenizer.json").read_bytes() == (TINY_BASE / "tokenizer.json").read_bytes()


def test_final_loads_with_transformers_alone(run: Path, tmp_path: Path) -> None:
    """A script that imports transformers and nothing of ours gives the same logits."""
    setup = set_up(parse(["--model", str(run / "final")]))
    prompts = [setup.inputs.prompter(setup.inputs.cues.held_out(i)) for i in range(3)]
    with torch.no_grad():
        mine = setup.engine.model.lm_head(
            prefill(setup.engine.model, PromptBatch.of(prompts, setup.engine.model.config, "cpu")).last_hidden
        )
    given = {
        f"{name}{i}": getattr(prompt, name).numpy()
        for i, prompt in enumerate(prompts)
        for name in ("ids", "patches", "grids")
    }
    np.savez(tmp_path / "in.npz", **given)
    script = f"""
import numpy as np, torch, sys
from transformers import AutoModelForImageTextToText, AutoTokenizer
model = AutoModelForImageTextToText.from_pretrained({str(run / "final")!r}, dtype=torch.float32).eval()
AutoTokenizer.from_pretrained({str(run / "final")!r})
given = np.load({str(tmp_path / "in.npz")!r})
logits = []
for i in range(3):
    ids = torch.from_numpy(given[f"ids{{i}}"])[None]
    with torch.no_grad():
        patches, grids = (torch.from_numpy(given[f"{{name}}{{i}}"]) for name in ("patches", "grids"))
        out = model(input_ids=ids, pixel_values=patches, image_grid_thw=grids,
                    mm_token_type_ids=(ids == model.config.image_token_id).int())
    logits.append(out.logits[0, -1].numpy())
np.save({str(tmp_path / "out.npy")!r}, np.stack(logits))
assert not any(name.startswith(("locus_fast", "locus_kernels")) for name in sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    np.testing.assert_allclose(mine.numpy(), np.load(tmp_path / "out.npy"), rtol=0, atol=1e-5)


def test_same_seed_and_any_workers_give_the_same_metrics(run: Path, tmp_path: Path) -> None:
    for workers in ("1", "4"):
        assert train.main([*SHORT, "--out", str(tmp_path / workers), "--workers", workers]) == 0
    assert (
        timeless(tmp_path / "1" / "metrics.jsonl")
        == timeless(tmp_path / "4" / "metrics.jsonl")
        == timeless(run / "metrics.jsonl")
    )
    assert train.main([*SHORT, "--out", str(tmp_path / "other"), "--seed", "1"]) == 0
    assert timeless(tmp_path / "other" / "metrics.jsonl") != timeless(run / "metrics.jsonl")


def test_microbatches_do_not_change_the_step(run: Path, tmp_path: Path) -> None:
    """Global denominators: one prompt a microbatch gives the same update as several, up to the order of
    sums."""
    assert (
        train.main([*SHORT, "--out", str(tmp_path / "one"), "--microbatch-tokens", "450", "--steps", "1"])
        == 0
    )
    one, several = timeless(tmp_path / "one" / "metrics.jsonl")[0], timeless(run / "metrics.jsonl")[0]
    for name in ("reward", "iou", "grad_norm", "loss", "kl", "zero_variance_groups"):
        assert one[name] == pytest.approx(several[name], rel=1e-3, abs=1e-6), name


def test_a_rollout_wider_than_a_microbatch(run: Path, tmp_path: Path) -> None:
    """Sampled together, prefilled again and trained on apart: the same replies and the same update, for more
    FLOPs."""
    assert (
        train.main([*SHORT, "--out", str(tmp_path / "wide"), "--rollout-tokens", "100000", "--steps", "1"])
        == 0
    )
    wide, narrow = timeless(tmp_path / "wide" / "metrics.jsonl")[0], timeless(run / "metrics.jsonl")[0]
    for name in ("reward", "iou", "grad_norm", "loss", "kl", "zero_variance_groups", "reply_tokens"):
        assert wide[name] == pytest.approx(narrow[name], rel=1e-3, abs=1e-6), name
    assert narrow["flops_over_floor"] < 1.1 < wide["flops_over_floor"]
    assert 0 < wide["fill"] <= 1


@pytest.mark.parametrize("active", [0, 1, 5])
def test_a_few_active_groups_are_prefilled_again(active: int, tmp_path: Path, monkeypatch) -> None:
    """The same update as with the other groups' prompts in its backward, for about the floor's FLOPs."""
    reward, rows = Scoring.reward, []

    def mostly_equal(*arguments):
        scored = reward(*arguments)
        equal = torch.arange(len(scored.zero_variance)) >= active
        return scored._replace(
            zero_variance=equal,
            advantage=torch.randn(len(equal), 8, generator=torch.Generator().manual_seed(0)).flatten(),
        )

    monkeypatch.setattr(Scoring, "reward", mostly_equal)
    more = ["--microbatch-tokens", "90000", "--steps", "1", "--skip-zero-variance", "true"]
    for pays in (Step._reuse_pays, lambda *_: True):
        monkeypatch.setattr(Step, "_reuse_pays", pays)
        out = tmp_path / str(len(rows))
        assert train.main([*SHORT, "--out", str(out), *more]) == 0
        rows += timeless(out / "metrics.jsonl")
    ours, through = rows
    assert ours["zero_variance_groups"] == 6 - active
    for name in (
        ("reward", "grad_norm", "loss", "kl", "logprob_mismatch") if active else ("reward", "grad_norm")
    ):
        assert ours[name] == pytest.approx(through[name], rel=1e-3, abs=1e-6), name
    assert ours["flops_over_floor"] < 1.12
    assert (through["flops_over_floor"] > 1.5) == (active == 1)


def test_resuming_gives_the_same_run(run: Path, tmp_path: Path) -> None:
    """Two steps, then the third: the metrics and the weights of a run in one go. Lines past the last
    checkpoint are written again."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / "step-000003")
    assert train.main(["--resume", str(out)]) == 0
    assert timeless(out / "metrics.jsonl") == timeless(run / "metrics.jsonl")
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (out, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_is_done_is_not_resumed(run: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(run, tmp_path / "run")
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "2"]) == 2
    assert "has done 3 steps" in capsys.readouterr().err
    (tmp_path / "run" / "checkpoints" / "step-000003" / "optimizer" / "state.safetensors").write_bytes(b"")
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "4"]) == 2
    assert "is not a whole checkpoint" in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_template_that_begins_the_thinking(tmp_path: Path) -> None:
    """The prompt ends in `<think>`, so the reply does not say it; the format reward reads both."""
    folder = tmp_path / "model"
    shutil.copytree(TINY_BASE, folder)
    template = (
        (folder / "chat_template.jinja")
        .read_text()
        .replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    )
    (folder / "chat_template.jinja").write_text(template)
    setup = set_up(parse(["--model", str(folder), "--prompt-style", "think"]))
    reply = setup.origin.source.tokenizer.encode(
        "the cue</think><answer>[10, 20, 30, 40]</answer>", add_special_tokens=False
    )
    rollout = Rollout(
        torch.tensor([reply]), torch.tensor([len(reply)]), torch.zeros(1, len(reply)), torch.tensor([False])
    )
    assert setup.scoring.read(rollout.ids, rollout.lengths).format_ok.tolist() == [True]
    plain = set_up(parse(["--prompt-style", "think"]))
    assert plain.scoring.read(rollout.ids, rollout.lengths).format_ok.tolist() == [False]


def test_evaluate_command(run: Path, capsys) -> None:
    capsys.readouterr()
    assert evaluate.main([str(run / "final"), "--eval-cues", "12"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = json.loads((run / "summary.json").read_text())["eval"]["after"]
    assert printed == {**expected, "skipped_images": 0}
    assert evaluate.main([str(run / "final")]) == 0  # asks as the run did
    assert json.loads(capsys.readouterr().out) == printed


def test_the_preset_of_a_model(run: Path) -> None:
    assert (
        parse([]).preset
        == parse(["--model", str(TINY_BASE)]).preset
        == parse(["--model", str(run / "final")]).preset
        == "tiny"
    )
    assert parse(["--model", "some/model"]).preset == parse(["--model", str(run)]).preset == "paper"
