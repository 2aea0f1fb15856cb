"""The examples of a run as prompts, made by threads ahead of their use, and what had to be passed over."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

from locus_fast.data.example import CueSource
from locus_fast.model.prompts import Prompt, Prompter


class Skipped:
    """Images that could not be used: each named once, the first few in full, and all of them counted."""

    SHOWN = 5

    def __init__(self) -> None:
        self.sentences: set[str] = set()

    def add(self, prompts: Iterable[Prompt]) -> None:
        for sentence in (s for prompt in prompts for s in prompt.skipped):
            if sentence not in self.sentences and len(self.sentences) <= self.SHOWN:
                more = len(self.sentences) == self.SHOWN
                what = "further images, counted in summary.json" if more else sentence
                tqdm.write(f"skipped: {what}", file=sys.stderr)
            self.sentences.add(sentence)


@dataclass(frozen=True)
class Inputs:
    """Where a run's prompts come from."""

    cues: CueSource
    prompter: Prompter
    skipped: Skipped

    def train(self, numbers: Iterable[int], workers: int, ahead: int) -> Generator[Prompt]:
        """The prompts of these training examples; see `prefetch`."""
        return prefetch(lambda number: self.prompter(self.cues.train(number)), numbers, workers, ahead)

    def held_out(self, workers: int, ahead: int) -> Generator[Prompt]:
        """The prompts of all held-out examples; see `prefetch`."""
        numbers = range(self.cues.held_out_count)
        return prefetch(lambda number: self.prompter(self.cues.held_out(number)), numbers, workers, ahead)


def prefetch(
    make: Callable[[int], Prompt], numbers: Iterable[int], workers: int, ahead: int
) -> Generator[Prompt]:
    """make(number) for each number, in order, computed by threads up to `ahead` numbers early (decoding and
    resizing release the GIL)."""
    waiting: deque[Future[Prompt]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for number in numbers:
                waiting.append(pool.submit(make, number))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
