"""The plan of a run from byte counts, and what an out-of-memory error does to a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locus_fast import budget, runtime, train
from locus_fast.checkpoint import TINY_BASE
from locus_fast.config import PRESETS, Config, parse
from locus_fast.cost import peak_memory, plan
from locus_fast.cost.plan import GIB, TOKENS, Room, unplanned
from locus_fast.cost.shapes import PUBLISHED, Group, group_of
from locus_fast.errors import UserError
from locus_fast.prompts import QUESTIONS
from locus_fast.runtime import set_up

SHAPE = PUBLISHED["qwen2.5-vl-7b"]
WAYS = {"reference": "copy", "max_tokens": 512}
SHORT = ["--prompts", "6", "--eval-cues", "6", "--device", "cpu"]


def extremes(replies: int = 8, max_tokens: int = 512) -> list[Group]:
    """The largest and the smallest prompt of the recipe."""
    bounds = Config().image_pixels, Config().cue_pixels
    sides = [(1024, 512), (512, 56)]
    return [group_of(SHAPE, [(image, image), (cue, cue)], bounds, text_tokens=128, replies=replies, reply_tokens=max_tokens) for image, cue in sides]


@pytest.mark.parametrize("gib", [78, 139, 400])
def test_the_plan_fills_the_memory_and_no_more(gib: int) -> None:
    groups, memory = extremes(), gib * GIB
    made = plan(SHAPE, groups, memory_bytes=memory, prompts=128, **WAYS)
    room = Room(SHAPE, memory, 128, 0, WAYS)
    for group in groups:
        assert room.holds(group, room.width(group, made.tokens), made.checkpointing)
    wider = [(group, room.width(group, made.tokens) + 1) for group in groups]
    assert any(not room.holds(group, count, made.checkpointing) for group, count in wider if count <= 128)
    assert made.tokens >= room.cost(groups[0])
    assert f"of {gib}.0 GiB" in made.reason
    assert "every layer recomputed" in made.reason


def test_no_recomputation_where_memory_abounds() -> None:
    made = plan(SHAPE, extremes(max_tokens=64), memory_bytes=4000 * GIB, prompts=128, reference="copy")
    assert made.checkpointing == 0
    assert "no layer recomputed" in made.reason
    assert "faster than the other way" in made.reason


def test_what_is_given_is_kept() -> None:
    made = plan(SHAPE, extremes(), memory_bytes=78 * GIB, prompts=128, tokens=9000, checkpointing=2, **WAYS)
    assert (made.tokens, made.checkpointing) == (9000, 2)
    assert "one layer in 2 recomputed" in made.reason
    assert plan(SHAPE, extremes(), memory_bytes=78 * GIB, prompts=128, tokens=9000, **WAYS).checkpointing == 1
    assert unplanned(0, -1).tokens == TOKENS
    assert unplanned(5, 0).checkpointing == 0


def test_a_wide_rollout_leaves_less_for_training() -> None:
    narrow, wide = (plan(SHAPE, extremes(), memory_bytes=78 * GIB, prompts=128, rollout_tokens=n, **WAYS).tokens for n in (0, 60_000))
    assert wide < narrow


@pytest.mark.parametrize(
    ("gib", "groups", "words"),
    [
        (24, extremes(), ["(weights 15.45, gradients 15.45, optimizer states 15.68, reference 15.45,", "24.0 GiB that are free", "--kl 0"]),
        (69, extremes(replies=16, max_tokens=4096), ["activations", "lower --max-tokens, --replies or the most of --image-pixels", "would fit"]),
    ],
)
def test_too_small_a_device_names_the_parts_and_the_mend(gib: int, groups: list[Group], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        plan(SHAPE, groups, memory_bytes=gib * GIB, prompts=128, reference="copy")
    for each in words:
        assert each in str(raised.value)


def test_parts_that_are_not_trained_take_less() -> None:
    group = extremes()[0]
    whole, frozen = (
        peak_memory(SHAPE, [group], checkpointing=1, trained=trained, train_vision=trained is None) for trained in (None, SHAPE.text.parameters)
    )
    assert frozen["gradients"] == 2 * SHAPE.text.parameters < whole["gradients"]
    assert sum(frozen.values()) < sum(whole.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_big_models_are_planned(preset: str) -> None:
    config = parse(["--preset", preset])
    assert (config.tokens, config.checkpointing) == ((12288, 0) if preset == "tiny" else (0, -1))


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_questions_text_is_no_longer_than_planned(question: str) -> None:
    setup = set_up(parse(["--question", question, "--eval-cues", "1"]))
    prompt = setup.prompter(setup.cues.train(0))
    words = len(setup.tokenizer.decode(prompt.ids[prompt.ids != setup.model.config.image_token_id]).split())
    assert words < budget.TEXT_TOKENS / 1.2  # a published tokenizer's tokens of these words


def test_a_run_takes_the_devices_memory(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda device: GIB)
    arguments = [*SHORT, "--steps", "1", "--tokens", "0", "--checkpointing", "-1", "--out", str(tmp_path / "run")]
    assert train.main(arguments) == 0
    planned = json.loads((tmp_path / "run" / "summary.json").read_text())["plan"]
    assert planned["reason"] in capsys.readouterr().err
    assert not planned["halved"]
    assert 0 < planned["tokens"] < 100_000
    monkeypatch.setattr(budget, "free_memory", lambda device: GIB // 100)
    monkeypatch.setattr(runtime, "load_source", None)  # refused before anything is loaded
    assert train.main([*arguments[:-1], str(tmp_path / "small")]) == 2
    assert "that are free on the device" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


class OutOfMemory:
    """The trainer's backward, which at given calls leaves its gradient behind and then finds no memory."""

    def __init__(self, *calls: int):
        self.backward, self.calls, self.count = train.backward, calls, 0

    def __call__(self, *arguments):
        self.count += 1
        self.backward(*arguments)
        if self.count in self.calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")


def numbers(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_out_of_memory_halves_the_budget_and_loses_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    assert train.main([*SHORT, "--steps", "2", "--tokens", "700", "--out", str(tmp_path / "narrow")]) == 0
    monkeypatch.setattr(train, "backward", OutOfMemory(2))
    assert train.main([*SHORT, "--steps", "2", "--tokens", "1400", "--out", str(tmp_path / "halved")]) == 0
    assert "out of memory: the step is done again in microbatches of 700 tokens" in capsys.readouterr().err
    assert json.loads((tmp_path / "halved" / "summary.json").read_text())["plan"]["halved"]
    for narrow, halved in zip(numbers(tmp_path / "narrow"), numbers(tmp_path / "halved"), strict=True):
        for name in ("reward", "iou", "loss", "kl", "grad_norm", "reply_tokens", "zero_variance_groups", "flops", "fill"):
            assert halved[name] == pytest.approx(narrow[name], rel=1e-4, abs=1e-7), name
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("halved", "narrow"))
    base = load_file(TINY_BASE / "model.safetensors")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-6)
    assert any((value - base[name].float()).abs().max() > 1e-4 for name, value in theirs.items())


@pytest.mark.parametrize(("tokens", "calls"), [("1400", (2, 4)), ("450", (1,))])
def test_out_of_memory_that_halving_does_not_mend(tmp_path: Path, monkeypatch, capsys, tokens: str, calls: tuple[int, ...]) -> None:
    """A second error, or a budget whose half does not hold the largest prompt: saved, and one sentence."""
    monkeypatch.setattr(train, "backward", OutOfMemory(*calls))
    assert train.main([*SHORT, "--steps", "2", "--tokens", tokens, "--out", str(tmp_path / "run")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "the device ran out of memory" in error[0]
    assert "lower --tokens (now" in error[0]
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir())
