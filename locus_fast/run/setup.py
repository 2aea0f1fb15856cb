"""Decided once for a run: device, model, examples, and how replies are read; shared by training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from locus_kernels.box_reward import CLOSED, build_token_table

from locus_fast.config import Config
from locus_fast.cost.plan import Plan, unplanned
from locus_fast.data import read_boxes
from locus_fast.data.collapse import refuse_collapsed
from locus_fast.data.cues import FileCues
from locus_fast.data.cutting import CueRecipe
from locus_fast.data.example import CueSource
from locus_fast.errors import UserError
from locus_fast.model.adapter_files import base_of, is_adapter_folder
from locus_fast.model.adapters import add_adapters, keep_adapters, merge_adapters, train_further
from locus_fast.model.attention import use_attention
from locus_fast.model.families import shape_of
from locus_fast.model.preprocess import describe_limits
from locus_fast.model.prompts import Prompter
from locus_fast.model.quantize import quantize
from locus_fast.run.disk import check_disk
from locus_fast.run.given import describe, role_of, settle
from locus_fast.run.inputs import Inputs, Skipped
from locus_fast.run.plan import check_rank, plan_for, trained_by
from locus_fast.step.budget import Budget
from locus_fast.step.engine import Engine
from locus_fast.step.rollout import Decoder, Vocabulary
from locus_fast.step.scoring import Scoring
from locus_fast.tiny.scenes import SceneCues
from locus_fast.weights.adapter_reader import read_adapters
from locus_fast.weights.checkpoint import is_hub_id, load_source, model_folder, weight_dtype
from locus_fast.weights.finite import first_not_finite
from locus_fast.weights.source import Source, read_source

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Origin:
    """Where the model came from, and so how it is written."""

    source: Source  # the base model's folder, and the adapters that --model holds
    role: str  # of these adapters, see `run.given`
    base: str  # what adapters call the base model: its hub id, or its folder


@dataclass(frozen=True)
class Setup:
    """What a run works with, by use. Each part goes only to who needs it."""

    config: Config  # as asked for, with the rank of the adapters that are trained
    engine: Engine
    inputs: Inputs
    scoring: Scoring
    origin: Origin
    notes: tuple[str, ...]  # what the user should know before the run begins, one line each


def set_up(config: Config, out: Path | None = None) -> Setup:
    """Load everything a run needs; raises UserError for what cannot be used, as much of it as can be known before the
    weights are read.

    out: the folder of a training run, for which device and disk must have room; None to evaluate alone.
    """
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    source = None if is_hub_id(config.model) else source_of(config)
    cues = cue_source(config)  # before a model is fetched: it is the quicker one to be wrong
    source = source or source_of(config)
    role = role_of(config, source, trains=out is not None)
    config = settle(config, source, role)
    prompter = prompter_of(config, source)
    if out is None:
        plan = unplanned(config.microbatch_tokens, config.checkpointing)
    else:
        plan = plan_run(config, source, device, out)
    model = open_model(config, source, device, role)
    table = build_token_table(source.tokenizer, model.lm_head.weight.shape[0]).to(device)
    scoring = Scoring.of(config, table, prompter.opening)
    vocabulary = Vocabulary.of(model, source.tokenizer, table, scoring.which, prompter.opening)
    if vocabulary.start == CLOSED:
        what = f"--answer-prefix {config.answer_prefix} has said the whole box already"
        raise UserError(f"{what}: leave it open, such as [ alone.")
    shape, budget = shape_of(model.config), Budget(plan.tokens, config.rollout_tokens)
    engine = Engine(device, model, Decoder(model, vocabulary), shape, trained_by(config), plan, budget)
    limits = describe_limits(config.image_pixels, source.limits, source.spec.factor, config.export_limits)
    notes = (cues.describe(), plan.reason, describe(config, source, role), limits)
    origin = Origin(source, role, base_name(config, source))
    return Setup(config, engine, Inputs(cues, prompter, Skipped()), scoring, origin, tuple(filter(None, notes)))


def base_name(config: Config, source: Source) -> str:
    """What adapters call the base model: its hub id, or its folder."""
    named = base_of(model_folder(config.model)) if source.adapters else config.model
    return named if is_hub_id(named) else str(source.folder.resolve())


def prompter_of(config: Config, source: Source) -> Prompter:
    """What turns examples into the model's prompts. Raises UserError for a question that its template cannot ask."""
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


def source_of(config: Config) -> Source:
    """The base model's folder: that of the model, or of what the model's adapters adapt, with these."""
    folder = model_folder(config.model)
    if not is_adapter_folder(folder):
        return read_source(folder)
    source = read_source(model_folder(base_of(folder)))
    return replace(source, adapters=read_adapters(folder, source.linears))


def plan_run(config: Config, source: Source, device: torch.device, out: Path) -> Plan:
    """The plan of a training run into the folder `out`; raises UserError if its weights are of a type that is not trained, or if the disk or the
    device has no room."""
    kind = weight_dtype(source.folder, source.config, DTYPES[config.dtype])
    if kind not in DTYPES.values():
        stored = str(kind).removeprefix("torch.")
        raise UserError(f"{source.folder}: its weights are {stored}, in which small updates are lost: give --dtype bfloat16 or --dtype float32.")
    shape = shape_of(source.config)
    check_rank(config, shape)
    check_disk(config, source, kind, out)
    return plan_for(config, shape, kind, device)


def open_model(config: Config, source: Source, device: torch.device, role: str) -> Any:
    """The model on the device, quantised or with adapters to train as the settings say. role: of those of the source."""
    model = load_source(source, torch.device("cpu") if config.quantize != "off" else device, DTYPES[config.dtype])
    if role == "merged":
        merge_adapters(source.adapters, model)
    if name := first_not_finite(model.named_parameters()):
        raise UserError(f"{source.folder}: {name} holds values that are not finite (NaN or infinite): fetch it again, or take an earlier state.")
    if config.quantize != "off":
        quantize(model, config.quantize, device)  # straight from the mapped files: the device never holds the whole layers
        model.to(device)
    if role == "trained":
        train_further(model, source.adapters, anchored=config.kl_coef > 0)
    elif config.lora:
        if role == "kept":
            keep_adapters(model, source.adapters)
        add_adapters(model, config.lora, config.lora_alpha)
    try:
        use_attention(model, backend=config.attention)
    except ValueError as error:
        raise UserError(f"--attention {config.attention}: {error}.") from None
    return model


def choose_device(name: str) -> torch.device:
    """The device of this name; auto is CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def cue_source(config: Config) -> CueSource:
    """Where examples come from."""
    if config.data:
        recipe = CueRecipe(mix=config.mix, min_side=config.min_side, padding=config.padding, scale=config.scale)
        table = read_boxes(Path(config.data), Path(config.images) if config.images else None, config.box_format)
        refuse_collapsed(table, recipe)
        return FileCues(table, recipe, seed=config.seed, held_out=config.eval_cues)
    if config.images:
        raise UserError("--images was given without --data: say where the boxes are, or give the folder of images as --data.")
    if config.preset != "tiny":
        raise UserError("--data is missing: give a COCO instances*.json, a JSONL of boxes, or a folder of images to train this model on.")
    return SceneCues(config.seed, config.eval_cues)
