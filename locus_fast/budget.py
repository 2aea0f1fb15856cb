"""What a microbatch may cost on this device: planned before the model is loaded, and halved where the plan was too bold."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm
from transformers import AutoConfig

from locus_fast.checkpoint import weight_dtype
from locus_fast.config import Config
from locus_fast.cost.plan import TEXT_TOKENS, Plan, plan, unplanned
from locus_fast.cost.shapes import ModelShape, group_of
from locus_fast.cost.traffic import STATE_BYTES
from locus_fast.optim import default_optimizer
from locus_fast.rollout import Decoder

T = TypeVar("T")


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a CUDA device; None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def plan_for(config: Config, folder: Path, dtype: torch.dtype | None, device: torch.device) -> Plan:
    """The plan of a training run of the model in this folder, from its config.json and the device's free memory.

    Prompts are taken to be between the fewest and the most pixels that an image and its cue may have, and replies as long as they may be. Raises
    UserError if one does not fit.
    """
    memory = free_memory(device)
    if memory is None or config.lora:  # adapters leave most of a card free, and the ledger counts training of whole weights
        return unplanned(config.tokens, config.checkpointing)
    try:
        described = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError):
        return unplanned(config.tokens, config.checkpointing)  # loading says what is wrong with it
    shape, kind = ModelShape.of(described), weight_dtype(folder, described, dtype)
    pixels = config.image_pixels, config.cue_pixels
    groups = [
        group_of(
            shape,
            [(round(math.sqrt(bounds[end])),) * 2 for bounds in pixels],
            pixels,
            text_tokens=TEXT_TOKENS,
            replies=config.replies,
            reply_tokens=config.max_tokens,
        )
        for end in (1, 0)
    ]
    train_vision = max(config.rates[:2]) > 0
    return plan(
        shape,
        groups,
        memory_bytes=memory,
        prompts=config.prompts,
        tokens=config.tokens,
        checkpointing=config.checkpointing,
        rollout_tokens=config.rollout_tokens,
        reference="none" if config.kl == 0 else "copy" if config.reference == "auto" else config.reference,
        train_vision=train_vision,
        trained=shape.vision.parameters * train_vision + shape.text.parameters * (config.rates[2] > 0),
        max_tokens=config.max_tokens,
        weight_bytes=kind.itemsize,
        gradient_bytes=kind.itemsize,
        state_bytes={"adamw": 8, "adamw-master": 12}.get(default_optimizer(config.optimizer, kind), STATE_BYTES),
        width=kind.itemsize,
    )


class Budget:
    """What a microbatch and a rollout may cost, in language-token equivalents. An out-of-memory error halves both, once in a run."""

    def __init__(self, tokens: int, rollout_tokens: int):
        self.tokens, self.rollout = tokens, max(tokens, rollout_tokens)
        self.halved = False

    def halve(self) -> None:
        self.tokens, self.rollout, self.halved = self.tokens // 2, self.rollout // 2, True

    def retry(self, run: Callable[[], T], largest: float, decoder: Decoder) -> T:
        """run(), and if the device's memory does not hold it, run() again with half the budget, which then stays. `run` must start anew each time.

        largest: the cost of the largest group, which half the budget has to allow. Raises torch.OutOfMemoryError where it does not, and the second
        time.
        """
        try:
            return run()
        except torch.OutOfMemoryError:
            if self.halved or self.tokens // 2 < largest:
                raise
        decoder.release()  # past the except clause, whose traceback holds the step's tensors
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.halve()
        tqdm.write(
            f"out of memory: the step is done again in microbatches of {self.tokens:,} tokens, half as many, as are those after", file=sys.stderr
        )
        return run()

    def too_small(self, checkpointing: int) -> str:
        """The sentence for a run that ends for want of memory."""
        again = " again, after the budget of a microbatch was halved" if self.halved else ""
        more = "" if checkpointing == 1 else ", or set --checkpointing 1"
        less = f"--tokens (now {self.tokens}), --max-tokens or the most of --image-pixels"
        return f"the device ran out of memory{again}: lower {less}{more}, and go on with --resume."
