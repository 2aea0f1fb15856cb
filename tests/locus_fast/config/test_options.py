"""Options and presets on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from locus_fast.config import PRESETS, Config, parse
from locus_fast.config.presets import LOSS_SETTINGS
from locus_fast.errors import UserError


def test_every_option_has_help_and_a_default(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for name, f in Config.__dataclass_fields__.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert f.metadata["help"]
    assert len(re.findall(r"default:", shown)) == len(Config.__dataclass_fields__)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold(preset: str) -> None:
    assert parse(["--preset", preset]).preset == preset
    assert parse(["--preset", preset, "--steps", "7"]).steps == 7


def test_options_cannot_be_shortened() -> None:
    with pytest.raises(UserError, match="--step"):
        parse(["--step", "5"])


OLD = {
    "question": "prompt-style",
    "replies": "group-size",
    "max-tokens": "max-new-tokens",
    "mean": "loss-agg",
    "kl": "kl-coef",
    "updates": "updates-per-batch",
    "rates": "lr-scale",
    "schedule": "lr-schedule",
    "warmup": "warmup-ratio",
    "grad-clip": "max-grad-norm",
    "tokens": "microbatch-tokens",
}


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("given", [["5"], []])
def test_an_old_name_is_answered_with_the_new_one(old: str, given: list[str]) -> None:
    words = [f"--{old}", *given] if given else [f"--{old}=5"]
    with pytest.raises(UserError) as raised:
        parse(words)
    assert str(raised.value) == f"--{old} is called --{OLD[old]} now: give --{OLD[old]}."


def test_an_old_value_is_answered_with_the_new_one() -> None:
    for old, new in (("token", "token-mean"), ("sequence", "seq-mean-token-mean")):
        with pytest.raises(
            UserError, match=f"^--loss-agg {old} is called {new} now: give --loss-agg {new}\\.$"
        ):
            parse(["--loss-agg", old])


def test_a_choice_that_is_none_is_answered_with_all() -> None:
    with pytest.raises(UserError, match=r"^--kl-estimator must be one of k1, k2, k3, not 'k4'\.$"):
        parse(["--kl-estimator", "k4"])


def test_a_resumed_run_keeps_its_loss_and_what_was_given_beside_it(tmp_path: Path) -> None:
    """gspo brings an aggregation, unless another was given: said again with --resume, it does not."""
    (tmp_path / "config.json").write_text(json.dumps({"loss": "gspo", "loss_agg": "token-mean"}))
    assert parse(["--loss", "gspo"]).loss_agg == "seq-mean-token-mean"
    assert parse(["--resume", str(tmp_path), "--loss", "gspo"]).loss_agg == "token-mean"
    with pytest.raises(UserError, match="--loss cannot be changed with --resume"):
        parse(["--resume", str(tmp_path), "--loss", "grpo"])


@pytest.mark.parametrize("loss", LOSS_SETTINGS)
def test_the_help_says_what_a_loss_brings(loss: str, capsys) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # lines end after hyphens too
    said = shown[shown.index("the objective;") :]
    said = said[: said.index("(default:")]
    assert loss in said
    assert LOSS_SETTINGS[loss]["loss_agg"] in said
