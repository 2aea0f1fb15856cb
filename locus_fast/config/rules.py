"""What a setting's value must satisfy, alone and together with the others."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

from locus_fast.config.options import described, fits, option_of
from locus_fast.config.presets import RENAMED_VALUES, may_hold_adapters
from locus_fast.config.settings import MAX_PIXELS, Config
from locus_fast.errors import UserError, short
from locus_fast.files import refuse_endless

PATHS = ("model", "data", "images", "out")

Rule = tuple[typing.Callable[[Any], bool], str]  # a test, and the words that complete "--name must be ..."


def between(least: int | float, most: int | float, why: str, words: str = "") -> Rule:
    """The rule that holds from `least` to `most`. words: of the lower end, where it is not "at least"."""
    return lambda v: least <= v <= most, f"{words or f'at least {least:,}'} and at most {most:,}, {why}"


LIFETIME = "more than any run does"
BUDGET = between(0, 2**31 - 1, "as packed rows are counted in 32 bits", "0 or more")
PIXELS: Rule = (
    lambda v: 0 < v[0] <= v[1] <= MAX_PIXELS,
    f"two values, above 0, the smaller first and at most {MAX_PIXELS:,}, the largest image that is read",
)
SCALE = "two values, above 0, the smaller first and at most 16, as the cue grows to so many times its side"
PADDING = "two values, 0 or more, the smaller first and at most 100, beyond which the margin is all there is"
RULES: dict[str, Rule] = {
    "steps": between(1, 100_000_000, LIFETIME),
    "save_every": between(0, 100_000_000, LIFETIME, "0 or more"),
    "prompts": between(1, 65_536, "as a step holds all of them in the host's memory"),
    "group_size": between(
        2, 512, "as an advantage compares the replies of a group, which one block of the GPU ranks"
    ),
    "max_new_tokens": between(1, 65_536, "as the decoder has room for the longest reply from the start"),
    "updates_per_batch": between(1, 1_000, "as each goes over all of a step's rollouts"),
    "eval_cues": between(1, 1_000_000, "as all of them are answered before and after"),
    "workers": between(1, 256, "as each is a thread"),
    "min_side": between(1, math.isqrt(MAX_PIXELS), "as no image that is read has a longer short side"),
    "microbatch_tokens": BUDGET,
    "rollout_tokens": BUDGET,
    "lora": between(0, 65_536, "and no more than the model is wide", "0 or more"),
    "checkpointing": between(-1, 1_000, "as no model has more layers", "-1, 0 or more"),
    "seed": (lambda v: 0 <= v < 2**63, "0 or more and below 2**63"),
    "image_pixels": PIXELS,
    "cue_pixels": PIXELS,
    **{
        name: (lambda v: v >= 0, "0 or more")
        for name in ("clip_low", "clip_high", "log_ratio_clamp", "kl_clamp")
    },
    **{name: (lambda v: v > 0, "above 0") for name in ("lr", "max_grad_norm")},
    **{name: (lambda v: 0 <= v <= 1, "between 0 and 1") for name in ("format_weight", "warmup_ratio")},
    "kl_coef": between(0, 1_000, "above which its gradient drowns the reward's", "0 or more"),
    "entropy_coef": between(0, 1_000, "above which its gradient drowns the reward's", "0 or more"),
    "delta": (lambda v: v >= 0, "0, or above 1 + --clip-high"),
    "weight_decay": between(0, 1_000, "as --lr times it is taken from each weight", "0 or more"),
    "lora_alpha": (lambda v: 0 < v <= 1e6, "above 0 and at most 1,000,000"),
    "temperature": (
        lambda v: 0.01 <= v <= 100,
        "above 0, from 0.01 to 100, as float32 logits are divided by it",
    ),
    "scale": (lambda v: 0 < v[0] <= v[1] <= 16, SCALE),
    "padding": (lambda v: 0 <= v[0] <= v[1] <= 100, PADDING),
    "lr_scale": (
        lambda v: min(v) >= 0 and 0 < max(v) <= 1_000,
        "three shares of 0 or more that are not all 0, and at most 1,000",
    ),
    "mix": (lambda v: min(v) >= 0 and sum(v) > 0, "three shares of 0 or more that are not all 0"),
    "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "device": (lambda v: v in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
}


def check(config: Config, settled: bool = False) -> Config:
    """The configuration itself, if every value can be, and with the others. settled: `lora` is known to be
    the rank of what is trained, those of the adapters that --model holds included."""
    for f in dataclasses.fields(Config):
        check_value(f.name, getattr(config, f.name))
    return check_together(config, settled)


def check_value(field: str, value: Any) -> None:
    """Raises UserError unless a field may have this value."""
    f, name = Config.__dataclass_fields__[field], option_of(field)
    hint = typing.get_type_hints(Config)[field]
    if not fits(value, hint):
        raise UserError(f"{name} cannot be {short(repr(value))}: it takes {described(hint)}.")
    if new := RENAMED_VALUES.get(field, {}).get(value):
        raise UserError(f"{name} {value} is called {new} now: give {name} {new}.")
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        raise UserError(
            f"{name} must be one of {', '.join(f.metadata['choices'])}, not {short(repr(value))}."
        )
    holds, words = RULES.get(field, (lambda _: True, ""))
    if not holds(value):
        raise UserError(f"{name} must be {words}; {short(value)} was given.")


def check_together(config: Config, settled: bool) -> Config:
    """The configuration itself, if its values go together."""
    for name in PATHS:
        moved = name == "out" and config.resume  # a resumed run's folder may have been moved
        if (value := getattr(config, name)) and not moved:
            refuse_endless(Path(value), option_of(name))
    defaults = Config.__dataclass_fields__
    needy = [name for name in ("quantize", "export") if getattr(config, name) != defaults[name].default]
    if needy and not (config.lora or (not settled and may_hold_adapters(config.model))):
        what = f"{option_of(needy[0])} {getattr(config, needy[0])}"
        raise UserError(f"{what} needs --lora: give the rank of the adapters, such as 16.")
    if config.lora and config.reference != "auto":
        why = "with --lora the reference is the policy without its adapters, at no cost"
        raise UserError(f"--reference {config.reference}: {why}; leave it away.")
    if config.export_limits and config.export == "adapter":
        why = (
            "--export-limits writes into an image processor's config, and with --export adapter final/ has "
            "none"
        )
        raise UserError(f"{why}: give one of the two.")
    if config.delta and config.loss == "cispo":
        raise UserError(
            "--delta bounds the ratio of a clipped objective, which --loss cispo has not: leave it out."
        )
    if config.delta and config.delta <= 1 + config.clip_high:
        why = "it would hold the ratio where the advantage is above 0, and not where it is negative"
        raise UserError(f"--delta must be above 1 + --clip-high, {1 + config.clip_high:g}: else {why}.")
    return config
