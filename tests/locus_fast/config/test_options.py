"""Options and presets on the command line."""

from __future__ import annotations

import re

import pytest

from locus_fast.config import PRESETS, Config, parse
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
