"""The command line of `python -m locus_fast.cost`. Needs no PyTorch, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import re
import typing
from typing import Any

from locus_fast.config import Config
from locus_fast.config.options import Parser, argument, given, option_of
from locus_fast.cost.memory import REFERENCES
from locus_fast.cost.plan import AUTO_CHECKPOINTING, AUTO_TOKENS, TEXT_TOKENS
from locus_fast.cost.shapes import PUBLISHED
from locus_fast.data.images import MAX_ASPECT, MAX_PIXELS
from locus_fast.errors import short

PRESET = "qwen2.5-vl-7b"
# its own options, with its words
TRAINERS = (
    "lora",
    "quantize",
    "lr_scale",
    "optimizer",
    "kl_coef",
    "dtype",
    "rollout_tokens",
    "image_pixels",
    "cue_pixels",
)
OURS = ("image", "cue", "text_tokens", "reply_tokens", "memory")  # what the trainer does not know


def size(text: str) -> tuple[int, int]:
    """(width, height) of WIDTHxHEIGHT."""
    if not (match := re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)) or not (int(match[1]) and int(match[2])):
        raise argparse.ArgumentTypeError(
            f"expected WIDTHxHEIGHT in pixels, such as 640x480, not '{short(text)}'"
        )
    short_side, long_side = sorted((int(match[1]), int(match[2])))
    if long_side > MAX_ASPECT * short_side or long_side * short_side > MAX_PIXELS:
        limits = f"at most {MAX_PIXELS:,} pixels, and {MAX_ASPECT} times as long as wide"
        raise argparse.ArgumentTypeError(f"an image may have {limits}, not '{short(text)}'")
    return int(match[1]), int(match[2])


def at_least(least: int, most: int = 1_000_000):
    def number(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,4000}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, not '{short(text)}'"
            )
        if int(text) > most:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at most {most}, not '{short(text)}'"
            )
        return int(text)

    return number


def parse(arguments: list[str]) -> dict[str, Any]:
    """What a command line names. Raises UserError for an unknown option or a value that cannot be."""
    d = Config()
    parser = Parser(
        prog="python -m locus_fast.cost",
        description="What a training step costs, counted from shapes.",
        allow_abbrev=False,
    )

    def add(name: str, type: Any, default: object, help: str, **more: Any) -> None:
        parser.add_argument(
            name, type=type, default=argparse.SUPPRESS, help=f"{help} (default: {default})", **more
        )

    add(
        "--preset",
        str,
        PRESET,
        "a preset's model: tiny, " + ", ".join(PUBLISHED) + "; empty: the default, or of --model its own",
    )
    add("--model", str, "empty", "a folder with a config.json, instead of the preset's model")
    add("--image", size, "640x480", "the image's WIDTHxHEIGHT in pixels")
    add("--cue", size, "64x64", "the cue's WIDTHxHEIGHT in pixels")
    add("--text-tokens", at_least(1), TEXT_TOKENS, "a prompt's tokens besides its images'")
    add("--prompts", at_least(1, 4096), d.prompts, "prompts a step")
    add("--group-size", at_least(1, 4096), d.group_size, "replies a prompt")
    add("--reply-tokens", at_least(1), 100, "tokens of a reply")
    add(
        "--max-new-tokens",
        at_least(1),
        d.max_new_tokens,
        "longest reply that is allowed, which the trainer makes room for",
    )
    add("--microbatch-tokens", at_least(0), AUTO_TOKENS, "budget of a microbatch in tokens; 0: what fits")
    every = "recompute every how many-th layer in backward; 0: none, -1: the faster of 0 and 1 that fits"
    add("--checkpointing", at_least(-1), AUTO_CHECKPOINTING, every)
    held = "how the KL's reference is held; none: no KL, auto: copy, or with --lora the policy without its"
    held += " adapters"
    add("--reference", str, "auto", held, choices=("auto", *REFERENCES))
    add("--memory", at_least(1), 78, "device memory in GiB that the step has to fit")
    hints = typing.get_type_hints(Config)
    for name in TRAINERS:
        f = Config.__dataclass_fields__[name]
        parser.add_argument(option_of(name), **argument(f, hints[name]))
    return given(parser, arguments)
