"""The plan of a run from byte counts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from locus_fast import train
from locus_fast.config import PRESETS, Config, parse
from locus_fast.cost import peak_memory, plan
from locus_fast.cost.memory import MemorySettings
from locus_fast.cost.plan import GIB, TEXT_TOKENS, TOKENS, Room, unplanned
from locus_fast.cost.shapes import EVERYTHING, PUBLISHED, Group, Trained, group_of
from locus_fast.errors import UserError
from locus_fast.model.prompts import PROMPT_STYLES
from locus_fast.run import model as runtime
from locus_fast.run import plan as plan_of_run
from locus_fast.run.plan import is_planned, planned, remedy
from locus_fast.run.setup import set_up
from tests.locus_fast.adapter_cases import needs_peft

SHAPE = PUBLISHED["qwen2.5-vl-7b"]
SHORT = ["--prompts", "6", "--eval-cues", "6", "--device", "cpu"]
HOW = MemorySettings(reference="copy", max_tokens=512)


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
