"""The plan of a run from byte counts, and what an out-of-memory error does to a run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locus_fast import train
from locus_fast.config import PRESETS, Config, parse
from locus_fast.cost import peak_memory, plan
from locus_fast.cost.memory import MemorySettings
from locus_fast.cost.plan import GIB, TEXT_TOKENS, TOKENS, Room, unplanned
from locus_fast.cost.shapes import EVERYTHING, PUBLISHED, Group, Trained, group_of
from locus_fast.errors import UserError
from locus_fast.model.prompts import PROMPT_STYLES
from locus_fast.run import evaluation
from locus_fast.run import model as runtime
from locus_fast.run import plan as plan_of_run
from locus_fast.run.plan import is_planned, planned, remedy
from locus_fast.run.setup import set_up
from locus_fast.step import optim, step
from locus_fast.step.step import Step
from locus_fast.weights.checkpoint import TINY_BASE
from tests.locus_fast.adapter_cases import needs_peft

SHAPE = PUBLISHED["qwen2.5-vl-7b"]
HOW = MemorySettings(reference="copy", max_tokens=512)
SHORT = ["--prompts", "6", "--eval-cues", "6", "--device", "cpu"]


def extremes(replies: int = 8, max_tokens: int = 512) -> list[Group]:
    """The largest and the smallest prompt of the recipe."""
    bounds = Config().image_pixels, Config().cue_pixels
    sides = [(1024, 512), (512, 56)]
    return [
        group_of(
            SHAPE,
            [(image, image), (cue, cue)],
            bounds,
            text_tokens=128,
            replies=replies,
            reply_tokens=max_tokens,
        )
        for image, cue in sides
    ]


@pytest.mark.parametrize("gib", [78, 139, 400])
def test_the_plan_fills_the_memory_and_no_more(gib: int) -> None:
    groups, memory = extremes(), gib * GIB
    made = plan(SHAPE, groups, memory_bytes=memory, prompts=128, how=HOW)
    room = Room(SHAPE, memory, 128, 0, HOW)
    for group in groups:
        assert room.holds(group, room.width(group, made.tokens), made.checkpointing)
    wider = [(group, room.width(group, made.tokens) + 1) for group in groups]
    assert any(not room.holds(group, count, made.checkpointing) for group, count in wider if count <= 128)
    assert made.tokens >= room.cost(groups[0])
    assert f"of {gib}.0 GiB" in made.reason
    assert "every layer recomputed" in made.reason


def test_no_recomputation_where_memory_abounds() -> None:
    made = plan(
        SHAPE,
        extremes(max_tokens=64),
        memory_bytes=4000 * GIB,
        prompts=128,
        how=MemorySettings(reference="copy"),
    )
    assert made.checkpointing == 0
    assert "no layer recomputed" in made.reason
    assert "faster than the other way" in made.reason


def test_what_is_given_is_kept() -> None:
    made = plan(SHAPE, extremes(), memory_bytes=78 * GIB, prompts=128, tokens=9000, checkpointing=2, how=HOW)
    assert (made.tokens, made.checkpointing) == (9000, 2)
    assert "one layer in 2 recomputed" in made.reason
    assert (
        plan(SHAPE, extremes(), memory_bytes=78 * GIB, prompts=128, tokens=9000, how=HOW).checkpointing == 1
    )
    assert unplanned(0, -1).tokens == TOKENS
    assert unplanned(5, 0).checkpointing == 0


def test_a_wide_rollout_leaves_less_for_training() -> None:
    narrow, wide = (
        plan(SHAPE, extremes(), memory_bytes=78 * GIB, prompts=128, rollout_tokens=n, how=HOW).tokens
        for n in (0, 60_000)
    )
    assert wide < narrow


@pytest.mark.parametrize(
    ("gib", "groups", "words"),
    [
        (
            24,
            extremes(),
            [
                "(weights 15.45, gradients 15.45, optimizer states 15.81, reference 15.45,",
                "24.0 GiB that are free",
            ],
        ),
        (69, extremes(replies=16, max_tokens=4096), ["activations", "69.0 GiB that are free"]),
    ],
)
def test_too_small_a_device_names_the_parts(gib: int, groups: list[Group], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        plan(SHAPE, groups, memory_bytes=gib * GIB, prompts=128, how=MemorySettings(reference="copy"))
    for each in words:
        assert each in str(raised.value)


def card(config: Config, gib: float) -> str:
    """What is said of a 7B run on a card of that size; empty if it fits."""
    card = (SHAPE, torch.bfloat16, round(gib * GIB))
    try:
        planned(config, *card)
    except UserError as error:
        return f"{error}; {remedy(config, lambda changed: is_planned(changed, *card))}"
    return ""


@pytest.mark.parametrize(
    ("gib", "arguments", "mend"),
    [
        (68, ["--group-size", "32", "--checkpointing", "0"], ["--checkpointing", "1", "--max-new-tokens"]),
        (66, [], ["--reference", "int8"]),
        (60, ["--max-new-tokens", "64"], ["--reference", "nf4"]),
        (52, [], ["--kl-coef", "0"]),
        (40, ["--reference", "host", "--optimizer", "adamw-master"], ["--lora", "16"]),
        (17, [], ["--lora", "16", "--quantize", "nf4"]),
        (11, ["--lora", "64"], ["--quantize", "nf4", "--max-new-tokens"]),
    ],
)
def test_the_largest_setting_that_fits_is_named_and_fits(
    gib: float, arguments: list[str], mend: list[str]
) -> None:
    base = ["--preset", "qwen2.5-vl-7b"]
    said = card(parse([*base, *arguments]), gib)
    assert "; this fits: " in said
    named = said.split("this fits: ")[1].split(" ")
    assert all(word in named for word in mend), said
    config = parse([*base, *arguments, *named])
    assert not card(config, gib)
    if "--max-new-tokens" in named:
        assert card(replace(config, max_new_tokens=config.max_new_tokens + 1), gib)


def test_where_nothing_fits_it_says_so() -> None:
    assert card(parse(["--preset", "qwen2.5-vl-7b"]), 2).endswith(
        "; take a larger device, a smaller --model, a smaller --group-size or smaller --image-pixels"
    )


def test_a_budget_that_is_given_and_too_large_is_kept_and_said() -> None:
    made = plan(SHAPE, extremes(), memory_bytes=72 * GIB, prompts=128, tokens=900_000, how=HOW)
    assert made.tokens == 900_000
    assert "with so long replies it does not fit" in made.reason


def test_parts_that_are_not_trained_take_less() -> None:
    group, frozen = extremes()[0], Trained(vision=False, projector=False)
    whole, language, adapters = (
        peak_memory(SHAPE, [group], 1, MemorySettings(trained=t))
        for t in (EVERYTHING, frozen, Trained.adapters(16))
    )
    assert language["gradients"] == 2 * SHAPE.text.parameters < whole["gradients"]
    assert sum(adapters.values()) < sum(language.values()) < sum(whole.values())
    assert adapters["gradients"] == 2 * 28 * SHAPE.text.adapters(16)
    assert (
        sum(
            Trained(*parts).parameters(SHAPE)
            for parts in ((True, False, False), (False, True, False), (False, False, True))
        )
        == SHAPE.parameters
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_big_models_are_planned(preset: str) -> None:
    config = parse(["--preset", preset])
    assert (config.microbatch_tokens, config.checkpointing) == ((12288, 0) if preset == "tiny" else (0, -1))


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_a_questions_text_is_no_longer_than_planned(style: str) -> None:
    setup = set_up(parse(["--prompt-style", style, "--eval-cues", "1"]))
    prompt = setup.inputs.prompter(setup.inputs.cues.train(0))
    words = len(
        setup.origin.source.tokenizer.decode(
            prompt.ids[prompt.ids != setup.engine.model.config.image_token_id]
        ).split()
    )
    assert words < TEXT_TOKENS / 1.2  # a published tokenizer's tokens of these words


@pytest.mark.parametrize("more", [[], pytest.param(["--lora", "4"], marks=needs_peft)])
def test_a_run_takes_the_devices_memory(more: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    """And says in one line what it chose and why; refused where it does not fit, before anything is
    loaded."""
    monkeypatch.setattr(plan_of_run, "free_memory", lambda device: GIB)
    arguments = [
        *SHORT,
        "--steps",
        "1",
        "--microbatch-tokens",
        "0",
        "--checkpointing",
        "-1",
        *more,
        "--out",
        str(tmp_path / "run"),
    ]
    assert train.main(arguments) == 0
    planned = json.loads((tmp_path / "run" / "summary.json").read_text())["plan"]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("microbatches of ")]
    assert said == [planned["reason"]]
    assert re.fullmatch(
        r"microbatches of [\d,]+ tokens, (no|every) layer recomputed: "
        r"up to 0\.\d of 1\.0 GiB with the longest replies, \d+ of the largest prompts "
        r"\(\d+ tokens\); by FLOPs and bytes faster than the other way",
        said[0],
    )
    assert not planned["halved"]
    assert 0 < planned["tokens"] < 100_000
    monkeypatch.setattr(plan_of_run, "free_memory", lambda device: GIB // 100)
    monkeypatch.setattr(runtime, "load_source", None)  # refused before anything is loaded
    assert train.main([*arguments[:-1], str(tmp_path / "small")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "that are free on the device" in error[0]
    assert not (tmp_path / "small").exists()


def test_without_a_device_to_ask_the_choice_is_said_too(tmp_path: Path, capsys) -> None:
    assert (
        train.main(
            [
                *SHORT,
                "--steps",
                "1",
                "--microbatch-tokens",
                "0",
                "--checkpointing",
                "-1",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    said = "microbatches of 32,768 tokens, every layer recomputed: "
    said += "not chosen by memory, there is no device to ask\n"
    assert said in capsys.readouterr().err


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
