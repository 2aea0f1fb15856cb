"""`python -m locus_fast.cost`: what it prints, takes and refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from locus_fast import cost
from locus_fast.config import Config
from locus_fast.cost.__main__ import main, model_of
from locus_fast.cost.plan import TEXT_TOKENS
from locus_fast.cost.shapes import PUBLISHED, group_of
from locus_fast.weights.checkpoint import TINY_BASE


@pytest.mark.parametrize("preset", ["tiny", *PUBLISHED])
def test_the_command_prints_every_part(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", preset, "--image", "640x480", "--group-size", "8", "--reply-tokens", "100"]) == 0
    printed = capsys.readouterr().out
    flops = (
        "vision",
        "vision attention",
        "prompt",
        "replies",
        "reply attention",
        "head",
        "decode",
        "over the floor",
        "repeats the prompt",
    )
    rest = (
        "decode: prompt keys",
        "kernel launches",
        "host syncs",
        "gradients",
        "optimizer states",
        "reference",
        "kept keys and values",
        "workspace",
    )
    for words in (*flops, *rest, "activations", "fits in 78 GiB"):
        assert words in printed, words
    assert "DOES NOT" not in printed


def test_the_command_needs_no_transformers() -> None:
    """Which takes most of the time where it is imported."""
    code = (
        "import sys; from locus_fast.cost.__main__ import main; assert main([]) == 0; assert 'transformers' "
        "not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "qwen2.5-vl-7b: 8,292,166,656 parameters" in done.stdout


def test_the_tiny_preset_is_the_embedded_base() -> None:
    assert model_of("tiny", "") == model_of("", str(TINY_BASE))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "640"], "expected WIDTHxHEIGHT in pixels, such as 640x480, not '640'"),
        (["--cue", "0x10"], "expected WIDTHxHEIGHT"),
        (["--group-size", "0"], "expected a whole number of at least 1, not '0'"),
        (["--reply-tokens", "many"], "expected a whole number"),
        (["--group-size", "1000000000"], "expected a whole number of at most 4096, not '1000000000'"),
        (["--image=-640x480"], "expected WIDTHxHEIGHT"),
        (["--preset", "gpt"], "--preset must be one of tiny, qwen2.5-vl-7b"),
        (["--model", "nowhere/at/all"], "there is no such folder"),
        (["--reference", "fp8"], "invalid choice: 'fp8'"),
        (["--images", "1x1"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_get_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "it costs the same, for its KL; with --skip-zero-variance"),
        (["--kl-coef", "0"], "no gradient without a KL"),
    ],
)
def test_what_a_group_of_equal_rewards_costs(more: list[str], sentence: str, capsys) -> None:
    """The ledger says it: everything with a KL; its prefill and its decoding where it is left out."""
    assert main(["--preset", "qwen2.5-vl-7b", *more]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "rewards are all equal" in line]
    assert sentence in line
    shape, preset = PUBLISHED["qwen2.5-vl-7b"], Config()
    bounds = (preset.image_pixels, preset.cue_pixels)
    group = group_of(
        shape, ((640, 480), (64, 64)), bounds, text_tokens=TEXT_TOKENS, replies=8, reply_tokens=100
    )
    spent = cost.total(
        cost.step_flops(
            shape, [replace(group, active=False)], checkpointing=1, reference=not more, executed=True
        )
    )
    assert f"{spent / 1e12:,.2f} TFLOP" in line
