"""A model whose chat template has begun to think, asked for the box alone: refused, or read from the end of
the thinking on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from locus_kernels.box_reward import CLOSED, START

from locus_fast import evaluate, train
from locus_fast.config import parse
from locus_fast.run import model as runtime
from locus_fast.run.setup import Setup, set_up
from locus_fast.step.rollout import Rollout
from locus_fast.weights.checkpoint import TINY_BASE

CLOSING = "</think>\n\n"


@pytest.fixture
def thinker(tmp_path: Path) -> Path:
    """The embedded base with a template that ends in `<think>` and a line break, as Qwen3-VL Thinking's
    does."""
    folder = tmp_path / "thinker"
    shutil.copytree(TINY_BASE, folder)
    template = (folder / "chat_template.jinja").read_text()
    changed = template.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert changed != template
    (folder / "chat_template.jinja").write_text(changed)
    return folder


def read(setup: Setup, text: str):
    """What the trainer reads of a reply."""
    reply = setup.origin.source.tokenizer.encode(text, add_special_tokens=False)
    lengths, cut_off = torch.tensor([len(reply)]), torch.tensor([False])
    rollout = Rollout(torch.tensor([reply]), lengths, torch.zeros(1, len(reply)), cut_off)
    return setup.scoring.read(rollout.ids, rollout.lengths)


def ends(setup: Setup, text: str) -> bool:
    """Whether the decoder ends the reply in it."""
    words = setup.engine.decoder.vocabulary
    state = words.start
    for token in setup.origin.source.tokenizer.encode(text, add_special_tokens=False):
        state = int(words.closing[token, state])
    return state == CLOSED


@pytest.mark.parametrize("more", [[], ["--answer-prefix", "["]])
@pytest.mark.parametrize("command", [train.main, evaluate.main])
def test_a_box_that_is_asked_for_while_thinking_is_refused(
    command, more: list[str], thinker: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """In one sentence that names both ways out, before any weight is loaded."""
    monkeypatch.setattr(runtime, "load_source", None)
    out = ["--out", str(tmp_path / "run")] if command is train.main else []
    assert (
        command(
            [
                "--model",
                str(thinker),
                "--prompt-style",
                "direct",
                "--eval-cues",
                "2",
                "--device",
                "cpu",
                *more,
                *out,
            ]
        )
        == 2
    )
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: --prompt-style direct: the model's chat template begins every reply with <think>"
    )
    assert "--prompt-style think" in error
    assert "--answer-prefix '</think>'" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prefix", ["</think>", CLOSING, f"none.{CLOSING}", f"[1, 2, 3, 4]{CLOSING}"])
def test_the_reply_begins_where_the_thinking_was_ended(prefix: str, thinker: Path) -> None:
    """Nothing before counts or ends it; the format can be earned, by the same replies as of a model that does
    not think."""
    setup = set_up(
        parse(
            [
                "--model",
                str(thinker),
                "--prompt-style",
                "direct",
                "--answer-prefix",
                prefix,
                "--eval-cues",
                "1",
            ]
        )
    )
    plain = set_up(parse(["--prompt-style", "direct", "--eval-cues", "1"]))
    assert setup.engine.decoder.vocabulary.start == START
    for text in (
        "[10, 20, 30, 40]",
        " [10, 20, 30, 40]\n",
        "at [10, 20, 30, 40]",
        "no box",
        "[40, 20, 30, 10]",
    ):
        ours, theirs = read(setup, text), read(plain, text)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), text
        assert ends(setup, text) == ends(plain, text) == ("[" in text)
    assert read(setup, "[10, 20, 30, 40]").format_ok.tolist() == [True]
    prompt = setup.origin.source.tokenizer.decode(setup.inputs.prompter(setup.inputs.cues.train(0)).ids)
    assert prompt.endswith(f"<think>\n{prefix}")


def test_what_stands_behind_the_end_of_the_thinking_is_part_of_the_reply(thinker: Path) -> None:
    setup = set_up(
        parse(
            [
                "--model",
                str(thinker),
                "--prompt-style",
                "direct",
                "--answer-prefix",
                "</think>[",
                "--eval-cues",
                "1",
            ]
        )
    )
    assert setup.engine.decoder.vocabulary.start != START
    assert read(setup, "10, 20, 30, 40]").box.tolist() == [[10, 20, 30, 40]]
    assert read(setup, "10, 20, 30, 40]").format_ok.tolist() == [True]
    assert ends(setup, "10, 20, 30, 40]")


def test_with_thinking_a_box_in_the_thinking_neither_counts_nor_ends(thinker: Path) -> None:
    setup = set_up(parse(["--model", str(thinker), "--prompt-style", "think", "--eval-cues", "1"]))
    guess = "perhaps [1, 2, 3, 4]"
    assert not ends(setup, guess)
    assert not read(setup, guess).valid.any()
    whole = f"{guess}</think><answer>[10, 20, 30, 40]</answer>"
    assert ends(setup, whole)
    assert read(setup, whole).box.tolist() == [[10, 20, 30, 40]]
    assert read(setup, whole).format_ok.tolist() == [True]


def test_a_template_that_ends_the_thinking_itself_is_asked_directly(tmp_path: Path) -> None:
    """As Qwen3's does when thinking is switched off."""
    folder = tmp_path / "silent"
    shutil.copytree(TINY_BASE, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        template.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
    )
    setup = set_up(parse(["--model", str(folder), "--prompt-style", "direct", "--eval-cues", "1"]))
    assert read(setup, "[10, 20, 30, 40]").format_ok.tolist() == [True]
