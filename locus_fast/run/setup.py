"""Decided once for a run: device, model, examples, and the prefetching of prompts; shared by training and evaluation."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from locus_kernels.box_reward import CLOSED, TokenTable, build_token_table
from locus_kernels.shared_prefix_attention import send
from torch import Tensor
from tqdm import tqdm

from locus_fast.config import Config
from locus_fast.cost.flops import group_cost
from locus_fast.cost.plan import Plan, unplanned
from locus_fast.cost.shapes import ModelShape
from locus_fast.data import read_boxes
from locus_fast.data.collapse import refuse_collapsed
from locus_fast.data.cues import FileCues
from locus_fast.data.cutting import CueRecipe
from locus_fast.data.example import CueSource
from locus_fast.errors import UserError
from locus_fast.model.adapter_files import base_of, is_adapter_folder
from locus_fast.model.adapters import add_adapters, keep_adapters, merge_adapters, train_further
from locus_fast.model.packing import PromptBatch, pack
from locus_fast.model.policy import use_attention
from locus_fast.model.preprocess import describe_limits
from locus_fast.model.prompts import GRAMMAR, WHICH_BOX, Prompt, Prompter
from locus_fast.model.quantize import quantize
from locus_fast.run.disk import check_disk
from locus_fast.run.given import describe, role_of, settle
from locus_fast.step.budget import Budget, check_rank, plan_for
from locus_fast.step.rollout import Decoder, Rollout, Vocabulary
from locus_fast.tiny.scenes import SceneCues
from locus_fast.weights.adapter_reader import read_adapters
from locus_fast.weights.checkpoint import is_hub_id, load_source, model_folder, weight_dtype
from locus_fast.weights.finite import first_not_finite
from locus_fast.weights.source import Source, read_source

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setup:
    """What a run works with."""

    config: Config
    device: torch.device
    source: Source  # the base model's folder
    model: Any
    shape: ModelShape
    decoder: Decoder
    table: TokenTable
    cues: CueSource
    prompter: Prompter
    skipped: Skipped
    plan: Plan
    budget: Budget
    role: str  # of the adapters that --model holds, see `locus_fast.run.given`
    notes: tuple[str, ...]  # what the user should know before the run begins, one line each

    @property
    def folder(self) -> Path:
        """Where the base model lies."""
        return self.source.folder

    @property
    def tokenizer(self) -> Any:
        return self.source.tokenizer

    @property
    def base(self) -> str:
        """What adapters call the base model: its hub id, or its folder."""
        model = self.config.model
        named = base_of(model_folder(model)) if self.source.adapters else model
        return named if is_hub_id(named) else str(self.folder.resolve())

    @property
    def reading(self) -> dict[str, Any]:
        """Which box of a reply counts, and what the format reward asks for."""
        return {"which": WHICH_BOX[self.config.question], "grammar": GRAMMAR[self.config.question]}

    def whole(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(ids int64 [R, L'], lengths int64 [R]) of the replies with what the prompt wrote of them that is read: a
        thinking model's `<think>`, unless it is asked without, and the answer's prefix."""
        opening = send(torch.tensor(self.prompter.opening, dtype=torch.int64), rollout.ids.device)
        return torch.cat([opening.expand(len(rollout.ids), -1), rollout.ids], 1), rollout.lengths + len(opening)

    def cost(self, prompt: Prompt, reply_tokens: int) -> float:
        """What a group with so many reply tokens costs a microbatch, in language-token equivalents."""
        return group_cost(self.shape, [(h, w) for _, h, w in prompt.grids.tolist()], len(prompt.ids), reply_tokens)

    def most(self, prompt: Prompt, replies: int) -> float:
        """The same at most: when every reply is as long as it may be."""
        return self.cost(prompt, replies * self.config.max_tokens)


def set_up(config: Config, out: Path | None = None) -> Setup:
    """Load everything a run needs; raises UserError for what cannot be used, as much of it as can be known before the weights are read.

    out: the folder of a training run, for which device and disk must have room; None to evaluate alone.
    """
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    source = None if is_hub_id(config.model) else source_of(config)
    cues = cue_source(config)  # before a model is fetched: it is the quicker one to be wrong
    source = source or source_of(config)
    role = role_of(config, source, trains=out is not None)
    config = settle(config, source, role)
    prompter = Prompter(
        source.tokenizer,
        source.config,
        source.spec,
        question=config.question,
        image_pixels=config.image_pixels,
        cue_pixels=config.cue_pixels,
        answer_prefix=config.answer_prefix,
    )
    prompter.check_question(config.question)
    plan = unplanned(config.tokens, config.checkpointing) if out is None else plan_run(config, source, device, out)
    model = open_model(config, source, device, role)
    table = build_token_table(source.tokenizer, model.lm_head.weight.shape[0]).to(device)
    vocabulary = Vocabulary.of(model, source.tokenizer, table, WHICH_BOX[config.question], prompter.opening)
    if vocabulary.start == CLOSED:
        raise UserError(f"--answer-prefix {config.answer_prefix} has said the whole box already: leave it open, such as [ alone.")
    shape, decoder = ModelShape.of(model.config), Decoder(model, vocabulary)
    budget = Budget(plan.tokens, config.rollout_tokens)
    limits = describe_limits(config.image_pixels, source.limits, source.spec.factor, config.export_limits)
    notes = tuple(filter(None, [describe(config, source, role), limits]))
    return Setup(config, device, source, model, shape, decoder, table, cues, prompter, Skipped(), plan, budget, role, notes)


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
    shape = ModelShape.of(source.config)
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
        train_further(model, source.adapters, anchored=config.kl > 0)
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


def prefetch(make: Callable[[int], Prompt], indices: Iterable[int], workers: int, ahead: int) -> Generator[Prompt]:
    """make(index) for each index, in order, computed by threads up to `ahead` indices early (decoding and resizing release the GIL)."""
    waiting: deque[Future[Prompt]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for index in indices:
                waiting.append(pool.submit(make, index))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def batches(setup: Setup, prompts: list[Prompt], first: int, costs: Sequence[float], budget: float) -> Iterator[tuple[list[int], PromptBatch]]:
    """Packed microbatches on the device, with their prompts' indices counted from `first`."""
    for chosen in pack(prompts, costs, budget):
        yield [first + i for i in chosen], PromptBatch.of([prompts[i] for i in chosen], setup.model.config, setup.device)


class Skipped:
    """Images that could not be used: each named once, the first few in full, and all of them counted."""

    SHOWN = 5

    def __init__(self) -> None:
        self.sentences: set[str] = set()

    def add(self, prompts: Iterable[Prompt]) -> None:
        for sentence in (s for prompt in prompts for s in prompt.skipped):
            if sentence not in self.sentences and len(self.sentences) <= self.SHOWN:
                more = len(self.sentences) == self.SHOWN
                tqdm.write("skipped: further images, counted in summary.json" if more else f"skipped: {sentence}", file=sys.stderr)
            self.sentences.add(sentence)
