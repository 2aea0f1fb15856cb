"""What a microbatch may cost on this device: as planned, and half of it where the plan was too bold."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from tqdm import tqdm

from locus_fast.errors import UserError

T = TypeVar("T")
NO_ROOM = (
    "hold the reference in fewer bytes (--reference nf4 or host), take --optimizer adamw8bit, or train less "
    "(--lr-scale, --lora)"
)


class HasBuffers(Protocol):
    def release(self) -> None:
        """Gives back what can be made anew."""


class Budget:
    """What a microbatch and a rollout may cost, in language-token equivalents. An out-of-memory error halves
    both, once in a run."""

    def __init__(self, tokens: int, rollout_tokens: int):
        self.tokens, self.rollout = tokens, max(tokens, rollout_tokens)
        self.halved = False

    def halve(self) -> None:
        self.tokens, self.rollout, self.halved = max(1, self.tokens // 2), max(1, self.rollout // 2), True

    def shares(self, costs: Sequence[float], budget: float) -> list[float]:
        """What each of these costs takes of a budget: no more than all of it once it was halved, so that a
        larger prompt rides alone."""
        return [min(cost, budget) for cost in costs] if self.halved else list(costs)

    def retry(self, run: Callable[[], T], decoder: HasBuffers, what: str = "the step") -> T:
        """run(), and if the device's memory does not hold it, run() again with half the budget, which then
        stays. `run` must start anew each time.

        Raises torch.OutOfMemoryError the second time.
        """
        try:
            return run()
        except torch.OutOfMemoryError:
            if self.halved:
                raise
        make_room(decoder)  # past the except clause, whose traceback holds the step's tensors
        self.halve()
        tqdm.write(
            f"out of memory: {what} is done again in microbatches of {self.tokens:,} tokens, half as many, "
            "as are those after",
            file=sys.stderr,
        )
        return run()

    def find_room(self, run: Callable[[], T], decoder: HasBuffers, what: str) -> T:
        """run(), and where memory is short once more without the decoder's buffers. `run` must have changed
        nothing when it fails. Raises UserError the second time."""
        try:
            return run()
        except torch.OutOfMemoryError:
            pass
        make_room(decoder)
        try:
            return run()
        except torch.OutOfMemoryError:
            raise UserError(f"{what} found no memory: {NO_ROOM}, and go on with --resume.") from None

    def too_small(self, checkpointing: int) -> str:
        """What to say of a run that ends for want of memory."""
        again = " again, after the budget of a microbatch was halved" if self.halved else ""
        more = "" if checkpointing == 1 else ", or set --checkpointing 1"
        less = f"--microbatch-tokens (now {self.tokens}), --max-new-tokens or the most of --image-pixels"
        return f"the device ran out of memory{again}: lower {less}{more}"


def make_room(decoder: HasBuffers) -> None:
    """Gives back what can be made anew: the decoder's buffers and graphs, and the allocator's free blocks."""
    decoder.release()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
