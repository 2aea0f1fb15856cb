"""`python -m locus_fast.cost`: what a step costs for any published shape, without weights, beside a
trainer that repeats the prompt; and whether the trainer would take it on a device of that memory."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from locus_fast.cost.command import parse
    from locus_fast.startup import answer_help

    answer_help(parse)

import sys
from typing import Any

import torch

from locus_fast.config import PRESETS, Config, check_together, check_value, default_preset
from locus_fast.cost.command import OURS, PRESET, TRAINERS, parse
from locus_fast.cost.plan import TEXT_TOKENS
from locus_fast.cost.shapes import PUBLISHED, ModelShape, group_of
from locus_fast.errors import UserError, short
from locus_fast.run.cost_report import Case, chosen, report
from locus_fast.run.plan import check_rank

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def settings_of(words: dict[str, Any]) -> Config:
    """The trainer's settings for what was given, over those of the preset. Raises UserError for a value
    that cannot be."""
    model = words.get("model", "")
    preset = words.get("preset") or (default_preset(model) if model else PRESET)
    if preset not in PRESETS or not (model or preset in ("tiny", *PUBLISHED)):
        raise UserError(
            f"--preset must be one of tiny, {', '.join(PUBLISHED)}, not '{short(preset)}'; another model's "
            "folder can be given as --model."
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
