"""Decided once for a run: device, model, examples, and the prefetching of prompts; shared by training and evaluation."""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from locus_kernels.box_reward import TokenTable, build_token_table
from torch import Tensor
from tqdm import tqdm

from locus_fast.checkpoint import check_folder, is_hub_id, load_model, model_folder
from locus_fast.config import Config
from locus_fast.cues import CueRecipe, FileCues
from locus_fast.data import read_boxes
from locus_fast.errors import UserError
from locus_fast.preprocess import PatchSpec
from locus_fast.prompts import GRAMMAR, WHICH_BOX, Prompter
from locus_fast.rollout import Vocabulary
from locus_fast.tiny.scenes import SceneCues
from locus_fast.types import CueSource, Prompt, PromptBatch, Rollout


@dataclass(frozen=True)
class Setup:
    """What a run works with."""

    config: Config
    device: torch.device
    folder: Path  # where the base model lies
    model: Any
    tokenizer: Any
    vocabulary: Vocabulary
    table: TokenTable
    cues: CueSource
    prompter: Prompter
    skipped: Skipped

    @property
    def reading(self) -> dict[str, Any]:
        """Which box of a reply counts, and what the format reward asks for."""
        return {"which": WHICH_BOX[self.config.question], "grammar": GRAMMAR[self.config.question]}

    def whole(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(ids int64 [R, L'], lengths int64 [R]) of the replies with what the chat template wrote of them: a thinking model's `<think>`."""
        opening = torch.tensor(self.prompter.opening, dtype=torch.int64, device=rollout.ids.device)
        return torch.cat([opening.expand(len(rollout.ids), -1), rollout.ids], 1), rollout.lengths + len(opening)


def set_up(config: Config) -> Setup:
    """Load everything a run needs; raises UserError for what cannot be used."""
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    if not is_hub_id(config.model):
        check_folder(model_folder(config.model))
    cues = cue_source(config)  # before a model is fetched or loaded: it is the quicker one to be wrong
    folder = model_folder(config.model)
    model, tokenizer = load_model(folder, device)
    prompter = Prompter(
        tokenizer,
        model.config,
        PatchSpec.of(model.config, folder),
        question=config.question,
        image_pixels=config.image_pixels,
        cue_pixels=config.cue_pixels,
    )
    table = build_token_table(tokenizer, model.lm_head.weight.shape[0]).to(device)
    return Setup(config, device, folder, model, tokenizer, Vocabulary.of(model, tokenizer), table, cues, prompter, Skipped())


def choose_device(name: str) -> torch.device:
    """The device of this name; auto is CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def cue_source(config: Config) -> CueSource:
    """Where examples come from."""
    if config.data:
        recipe = CueRecipe(mix=config.mix, min_side=config.min_side, padding=config.padding, scale=config.scale)
        table = read_boxes(Path(config.data), Path(config.images) if config.images else None)
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


def pack(prompts: list[Prompt], first: int, reply_tokens: int, budget: int) -> Iterator[tuple[list[int], list[Prompt]]]:
    """Microbatches of whole groups, in order: (the prompts' indices, counted from `first`; the prompts).

    A group costs its prompt's tokens plus `reply_tokens`, the most its replies can have.
    """
    indices: list[int] = []
    bin_: list[Prompt] = []
    used = 0
    for index, prompt in enumerate(prompts, first):
        cost = len(prompt.ids) + reply_tokens
        if cost > budget:
            raise UserError(
                f"{prompt.source}: its prompt of {len(prompt.ids)} tokens and its replies ({reply_tokens}) exceed a microbatch of {budget} tokens; "
                "raise --tokens, or lower the most of --image-pixels, --replies or --max-tokens."
            )
        if bin_ and used + cost > budget:
            yield indices, bin_
            indices, bin_, used = [], [], 0
        indices.append(index)
        bin_.append(prompt)
        used += cost
    if bin_:
        yield indices, bin_


def batches(setup: Setup, prompts: list[Prompt], first: int, replies: int) -> Iterator[tuple[list[int], PromptBatch]]:
    """`pack` on the device."""
    config = setup.config
    for indices, bin_ in pack(prompts, first, replies * config.max_tokens, config.tokens):
        yield indices, PromptBatch.of(bin_, setup.device)


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


class Interrupt:
    """Ctrl-C asks the run to end after the microbatch at hand; a second one ends it at once, and further ones do nothing while it saves."""

    def __init__(self) -> None:
        self.count = 0

    @property
    def requested(self) -> bool:
        return self.count > 0

    def __enter__(self) -> Interrupt:
        self.previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def _ask(self, *_: object) -> None:
        self.count += 1
        if self.count == 2:
            raise KeyboardInterrupt
