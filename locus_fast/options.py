"""From a dataclass of settings to the options of a command line, and from words to values. What cannot be
read is one sentence."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from locus_fast.errors import UserError, short

SIZES = 1e-30, 1e30  # what a number's size must lie between, if it is not 0: it is computed with in float32
WORDS = {int: "a whole number", float: "a finite number, 0 or of a size from 1e-30 to 1e30", bool: "true or false", str: "text"}


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. Run with --help for the options.")


def option_of(name: str) -> str:
    """The option of a setting: --max-tokens of max_tokens."""
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, settings: Any, shown: Callable[[dataclasses.Field], str], hidden: Iterable[str] = ()) -> None:
    """An option for each field of the dataclass `settings` (as `config.option` makes them), without
    defaults, so that only what is given comes out. shown: a field's default as the help states it; hidden:
    fields the help leaves out."""
    hints = typing.get_type_hints(settings)
    for f in dataclasses.fields(settings):
        keywords = argument(f, hints[f.name], shown(f))
        if f.name in hidden:
            keywords["help"] = argparse.SUPPRESS
        parser.add_argument(option_of(f.name), **keywords)


def argument(f: dataclasses.Field, hint: Any, shown: str) -> dict[str, Any]:
    """argparse keywords of a field; argparse reads % in a help as a format."""
    keywords: dict[str, Any] = {"help": f"{f.metadata['help']} (default: {shown})".replace("%", "%%"), "default": argparse.SUPPRESS}
    parts = typing.get_args(hint)
    kind = parts[0] if parts else hint
    keywords["type"] = {bool: _boolean, int: _whole, float: _number}.get(kind, kind)
    keywords["metavar"] = kind.__name__.upper() if kind is not str else f.name.upper()
    if parts:
        keywords["nargs"] = len(parts)
    if f.metadata["choices"]:
        keywords |= {"choices": f.metadata["choices"], "metavar": None}
    return keywords


def given(parser: argparse.ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    """The settings that a command line names, with tuples for several values."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(parser.parse_args(arguments)).items()}


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
