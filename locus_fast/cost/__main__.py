"""`python -m locus_fast.cost`: what a step costs for any published shape, without weights, beside a
trainer that repeats the prompt; and whether the trainer would take it on a device of that memory."""

from __future__ import annotations

import argparse
import re
import sys
import typing
from typing import Any

import torch

from locus_fast.config import PRESETS, Config, check_together, check_value, default_preset
from locus_fast.config.options import Parser, argument, given, option_of
from locus_fast.cost.memory import REFERENCES
from locus_fast.cost.plan import AUTO_CHECKPOINTING, AUTO_TOKENS, TEXT_TOKENS
from locus_fast.cost.report import Case, chosen, report
from locus_fast.cost.shapes import PUBLISHED, ModelShape, group_of
from locus_fast.data.images import MAX_ASPECT, MAX_PIXELS
from locus_fast.errors import UserError, short
from locus_fast.run.plan import check_rank

PRESET = "qwen2.5-vl-7b"
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
)  # its own options, with its words
OURS = ("image", "cue", "text_tokens", "reply_tokens", "memory")  # what the trainer does not know
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    held = "how the KL's reference is held; none: no KL, auto: copy, or with --lora the policy without its adapters"
    add("--reference", str, "auto", held, choices=("auto", *REFERENCES))
    add("--memory", at_least(1), 78, "device memory in GiB that the step has to fit")
    hints = typing.get_type_hints(Config)
    for name in TRAINERS:
        f = Config.__dataclass_fields__[name]
        parser.add_argument(option_of(name), **argument(f, hints[name]))
    return given(parser, arguments)


def settings_of(words: dict[str, Any]) -> Config:
    """The trainer's settings for what was given, over those of the preset. Raises UserError for a value
    that cannot be."""
    model = words.get("model", "")
    preset = words.get("preset") or (default_preset(model) if model else PRESET)
    if preset not in PRESETS or not (model or preset in ("tiny", *PUBLISHED)):
        raise UserError(
            f"--preset must be one of tiny, {', '.join(PUBLISHED)}, not '{short(preset)}'; another model's folder can be given as --model."
        )
    own = {name: value for name, value in words.items() if name not in OURS}
    for name in TRAINERS:
        if name in own:
            check_value(name, own[name])
    if own.get("reference") == "none":
        own |= {"reference": "auto", "kl_coef": 0.0}
    settings = {**PRESETS[preset], **own, "preset": preset, "model": model}
    settings["max_new_tokens"] = max(
        settings.get("max_new_tokens", Config.max_new_tokens), words.get("reply_tokens", 100)
    )
    return check_together(Config(**settings), settled=False)


def model_of(preset: str, model: str) -> tuple[ModelShape, torch.dtype]:
    """(shape, type of the weights) of a model folder, or of a preset's model. Raises UserError if there is
    none."""
    if not model and preset in PUBLISHED:
        return PUBLISHED[preset], torch.bfloat16
    # takes seconds, and the published shapes do not need it
    from locus_fast.model.adapter_files import base_of, is_adapter_folder
    from locus_fast.model.families import read_config, shape_of
    from locus_fast.weights.checkpoint import model_folder

    if is_adapter_folder(folder := model_folder(model)):
        folder = model_folder(base_of(folder))
    try:
        config = read_config(folder)
        return shape_of(config), config.dtype or config.get_text_config().dtype or torch.bfloat16
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model {folder}: its config.json cannot be read ({str(error).splitlines()[0]})."
        ) from None


def case_of(words: dict[str, Any]) -> Case:
    """What is asked about. Raises UserError for what cannot be."""
    config = settings_of(words)
    shape, stored = model_of(config.preset, config.model)
    check_rank(config, shape)
    images = words.get("image", (640, 480)), words.get("cue", (64, 64))
    group = group_of(
        shape,
        images,
        (config.image_pixels, config.cue_pixels),
        text_tokens=words.get("text_tokens", TEXT_TOKENS),
        replies=config.group_size,
        reply_tokens=words.get("reply_tokens", 100),
    )
    return Case(config, shape, DTYPES.get(config.dtype, stored), group, images, words.get("memory", 78))


def main(arguments: list[str]) -> int:
    """The command; returns the exit code: 0, 1 if the step does not fit, or 2 for a mistake in the input."""
    try:
        case = case_of(parse(arguments))
        choice = chosen(case)
        for line in report(case, choice):
            print(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if choice.proposal else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
