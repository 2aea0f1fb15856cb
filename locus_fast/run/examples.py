"""Where a run's examples come from, and what makes prompts of them."""

from __future__ import annotations

from pathlib import Path

from locus_fast.config import Config
from locus_fast.data import read_boxes
from locus_fast.data.collapse import refuse_collapsed
from locus_fast.data.cues import FileCues
from locus_fast.data.cutting import CueRecipe
from locus_fast.data.example import CueSource
from locus_fast.errors import UserError
from locus_fast.model.preprocess import describe_limits
from locus_fast.model.prompts import Prompter
from locus_fast.tiny.scenes import SceneCues
from locus_fast.weights.source import Source


def cue_source(config: Config) -> CueSource:
    """Where examples come from."""
    if config.data:
        recipe = CueRecipe(
            mix=config.mix, min_side=config.min_side, padding=config.padding, scale=config.scale
        )
        table = read_boxes(
            Path(config.data), Path(config.images) if config.images else None, config.box_format
        )
        refuse_collapsed(table, recipe)
        return FileCues(table, recipe, seed=config.seed, held_out=config.eval_cues)
    if config.images:
        raise UserError(
            "--images was given without --data: say where the boxes are, or give the folder of images as "
            "--data."
        )
    if config.preset != "tiny":
        raise UserError(
            "--data is missing: give a COCO instances*.json, a JSONL of boxes, or a folder of images to "
            "train this model on."
        )
    return SceneCues(config.seed, config.eval_cues)


def prompter_of(config: Config, source: Source) -> Prompter:
    """What turns examples into the model's prompts. Raises UserError for a question that its template cannot
    ask."""
    prompter = Prompter(
        source.tokenizer,
        source.config,
        source.spec,
        style=config.prompt_style,
        image_pixels=config.image_pixels,
        cue_pixels=config.cue_pixels,
        answer_prefix=config.answer_prefix,
    )
    prompter.check_style()
    return prompter


def describe_pixels(config: Config, source: Source) -> str:
    """Where the run's pixel limits are not the processor's own, in words; empty if they are."""
    return describe_limits(config.image_pixels, source.limits, source.spec.factor, config.export_limits)
