"""From a dataclass of settings to the options of a command line, and from words to values. What cannot be
read is one sentence."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterable
from typing import Any, NoReturn

from locus_fast.config.presets import PRESETS, RENAMED
from locus_fast.config.settings import GROUPS
from locus_fast.errors import UserError, short

SIZES = 1e-30, 1e30  # what a number's size must lie between, if it is not 0: it is computed with in float32
FLOAT = "a finite number, 0 or of a size from 1e-30 to 1e30"
WORDS = {int: "a whole number", float: FLOAT, bool: "true or false", str: "text"}


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit, and for the names of earlier
    versions."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known = self._option_string_actions
        for word in args or ():
            name = word.partition("=")[0].removeprefix("--").replace("-", "_")
            if word.startswith("--") and word.partition("=")[0] not in known and name in RENAMED:
                new = option_of(RENAMED[name])
                raise UserError(f"{option_of(name)} is called {new} now: give {new}.")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. Run with --help for the options.")


def option_of(name: str) -> str:
    """The option of a setting: --group-size of group_size."""
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, settings: Any, hidden: Iterable[str] = ()) -> None:
    """An option for each field of the dataclass `settings` (as `settings.option` makes them), in the groups
    of `GROUPS`, without defaults, so that only what is given comes out. hidden: fields that the help leaves
    out."""
    hints = typing.get_type_hints(settings)
    for title, example in GROUPS.items():
        fields = [f for f in dataclasses.fields(settings) if f.metadata["group"] == title]
        shown = [f for f in fields if f.name not in hidden]
        whole = not {option_of(f.name) for f in fields if f.name in hidden} & {*example.split()}
        say = f"for example: {example}" if whole else None
        group = parser.add_argument_group(title, say) if shown else parser
        for f in fields:
            keywords = argument(f, hints[f.name])
            if f.name in hidden:
                keywords["help"] = argparse.SUPPRESS
            group.add_argument(option_of(f.name), **keywords)


def argument(f: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """argparse keywords of a field; its help states the default, and the tiny preset's where that differs.
    argparse reads % in a help as a format."""
    default = str(f.default if f.default != "" else "empty")
    if f.name in PRESETS["tiny"]:
        default += f"; tiny: {PRESETS['tiny'][f.name]}"
    keywords: dict[str, Any] = {"help": f"{f.metadata['help']} (default: {default})".replace("%", "%%")}
    parts = typing.get_args(hint)
    kind = parts[0] if parts else hint
    keywords["default"] = argparse.SUPPRESS
    keywords["type"] = {bool: _boolean, int: _whole, float: _number}.get(kind, kind)
    keywords["metavar"] = kind.__name__.upper() if kind is not str else f.name.upper()
    if parts:
        keywords["nargs"] = len(parts)
    if f.metadata["choices"]:
        keywords["metavar"] = f"{{{','.join(f.metadata['choices'])}}}"  # `rules` says what is none of them
    return keywords


def given(parser: argparse.ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    """The settings that a command line names, with tuples for several values."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parser.parse_args(arguments)).items()
    }


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got '{short(text)}'")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python reads no more than 4,300 digits
        raise argparse.ArgumentTypeError(f"expected a whole number, got '{short(text)}'") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got '{short(text)}'") from None


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type, and a number that is no whole one of a size that float32 has."""
    if parts := typing.get_args(hint):
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(fits, value, parts))
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (value == 0 or SIZES[0] <= abs(value) <= SIZES[1])  # False for NaN
    return isinstance(value, hint) and isinstance(value, bool) == (hint is bool)


def described(hint: Any) -> str:
    """The type of a field in words."""
    parts = typing.get_args(hint)
    return f"{len(parts)} values, each {WORDS[parts[0]]}" if parts else WORDS[hint]
