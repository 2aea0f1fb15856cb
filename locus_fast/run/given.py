"""What becomes of the adapters that --model holds, decided before any weight is read.

trained   further, from where they are: what a run does unless it is told otherwise
kept      as they are and counted in, with new ones of rank --lora beside them
merged    into the weights, of which then all are trained (--merge); and for evaluation
""          there are none
"""

from __future__ import annotations

from dataclasses import replace

from locus_fast.config import Config, check
from locus_fast.errors import UserError
from locus_fast.model.adapter_files import dropout_of
from locus_fast.weights.checkpoint import model_folder
from locus_fast.weights.source import Source


def role_of(config: Config, source: Source, trains: bool) -> str:
    """The role of the adapters of --model. trains: whether the model is opened to be trained. Raises
    UserError for options that contradict it."""
    if not source.adapters:
        if config.merge:
            raise UserError(
                f"--merge: {config.model or 'the embedded base'} holds no adapters; leave the option away."
            )
        return ""
    if not trains:
        return "merged"
    if config.merge:
        if config.lora:
            raise UserError("--merge trains all weights, and --lora adapters alone: give one of the two.")
        return "merged"
    return "kept" if config.lora else "trained"


def settle(config: Config, source: Source, role: str) -> Config:
    """The settings with the rank and the scale of the adapters that are trained, whose own they are where
    they are trained further. Raises UserError for options that need adapters where none are trained, or that
    do not go with them."""
    if role == "trained":
        largest = max(source.adapters.values(), key=lambda pair: pair.rank)
        config = replace(config, lora=largest.rank, lora_alpha=largest.rank * abs(largest.scale) or 1.0)
    return check(config, settled=True)


def describe(config: Config, source: Source, role: str) -> str:
    """One line on what a run does with the adapters of --model; empty where there are none."""
    if not role:
        return ""
    ranks = sorted({pair.rank for pair in source.adapters.values()})
    which = f"{config.model}: its {len(source.adapters)} adapters of rank {' and '.join(map(str, ranks))}"
    left = dropout_of(model_folder(config.model))
    held = {"merged": "the merged model", "adapter": "the adapters"}[config.export]
    if role == "merged":
        return f"{which} are merged, and all weights trained"
    if role == "kept":
        together = "one adapter that is both" if config.export == "adapter" else held
        how = f"stay as they are, and new ones of rank {config.lora} are trained on them"
        return f"{which} {how}; final/ will hold {together}"
    dropout = f" without their dropout of {left:g}" if left else ""
    otherwise = "--lora adds new ones, --merge trains all weights"
    return f"{which} are trained further{dropout} ({otherwise}); final/ will hold {held}"
