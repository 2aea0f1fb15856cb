"""Cue search on held-out data: greedy replies, mean IoU and accuracies, by size class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from locus_kernels.box_reward import iou
from torch import Tensor
from tqdm import tqdm

from locus_fast.config import Config
from locus_fast.data.cutting import SIZE_CLASSES
from locus_fast.errors import UserError
from locus_fast.model.packing import PromptBatch
from locus_fast.model.policy import prefill
from locus_fast.model.prompts import Prompt
from locus_fast.run.inputs import Inputs
from locus_fast.step.engine import Engine
from locus_fast.step.rollout import Sampling
from locus_fast.step.scoring import Scoring

AHEAD = 64  # prompts packed at a time


@dataclass(frozen=True)
class Evaluation:
    """Greedy answers to n held-out cues. Boxes are xyxy in pixels of the original image."""

    box: Tensor  # float32 [n, 4], zeros where not valid
    valid: Tensor  # bool [n]
    iou: Tensor  # float32 [n], 0 where not valid
    size_class: tuple[str, ...]

    @staticmethod
    def joined(parts: Sequence[Evaluation]) -> Evaluation:
        """One evaluation of several, end to end."""
        box, valid, score = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("box", "valid", "iou")
        )
        return Evaluation(box, valid, score, tuple(size for part in parts for size in part.size_class))

    def summary(self) -> dict[str, float | int | dict]:
        """n, mean_iou, acc50, acc75, valid; and `by_size`, the same for each size class that occurs."""
        occurring = [size for size in SIZE_CLASSES if size in self.size_class]
        by_size = {size: self._figures([s == size for s in self.size_class]) for size in occurring}
        return {**self._figures([True] * len(self.size_class)), "by_size": by_size}

    def _figures(self, chosen: list[bool]) -> dict[str, float | int]:
        pick = torch.tensor(chosen)
        score, valid = self.iou[pick], self.valid[pick]
        figures = {"mean_iou": score, "acc50": score >= 0.5, "acc75": score >= 0.75, "valid": valid}
        return {
            "n": sum(chosen),
            **{name: round(value.float().mean().item(), 6) for name, value in figures.items()},
        }


@torch.no_grad()
def evaluate(
    config: Config, engine: Engine, inputs: Inputs, scoring: Scoring, label: str, stop: Callable[[], bool]
) -> Evaluation | None:
    """Ask every held-out cue once, greedily. None if `stop` said so before the end. Raises UserError if the
    device's memory does not do, or if the model's answers are not finite."""
    count = inputs.cues.held_out_count
    done: list[Evaluation] = []
    prompts = inputs.held_out(config.workers, ahead=AHEAD)
    with closing(prompts), tqdm(total=count, desc=label, unit="cue", leave=False) as bar:
        for start in range(0, count, AHEAD):
            chunk = []
            for _ in range(min(AHEAD, count - start)):
                chunk.append(next(prompts))
                if stop():
                    return None
            inputs.skipped.add(chunk)
            ask = partial(answer, engine, scoring, chunk, start, config.max_new_tokens, stop)
            try:
                answered = engine.budget.retry(ask, engine.decoder, "answering")
            except torch.OutOfMemoryError:
                raise UserError(f"{engine.budget.too_small(checkpointing=1)}.") from None
            if answered is None:
                return None
            done.append(answered)
            bar.update(len(chunk))
    return Evaluation.joined(done)


def answer(
    engine: Engine, scoring: Scoring, chunk: list[Prompt], start: int, longest: int, stop: Callable[[], bool]
) -> Evaluation | None:
    """Greedy answers of at most `longest` tokens to held-out prompts, the first of which is cue `start`, in
    their order. None if `stop` said so between microbatches."""
    sampling = Sampling(group_size=1, max_new_tokens=longest, temperature=0.0, top_p=1.0)
    done, order = [], []
    for numbers, batch in engine.microbatches(chunk, start, longest, engine.budget.tokens):
        if stop():
            return None
        rollout = engine.decoder.generate(prefill(engine.model, batch), sampling, seed=0, groups=numbers)
        if not rollout.logprob.isfinite().all():
            raise UserError(
                "the model answers held-out cues with log-probs that are not finite (NaN or infinite): take "
                "other weights, or give --dtype float32."
            )
        done.append(_judged(scoring, batch, rollout.ids, rollout.lengths))
        order += [number - start for number in numbers]
    place = torch.tensor(order).argsort()
    whole = Evaluation.joined(done)
    sizes = tuple(prompt.size_class for prompt in chunk)
    return Evaluation(whole.box[place], whole.valid[place], whole.iou[place], sizes)


def _judged(scoring: Scoring, batch: PromptBatch, ids: Tensor, lengths: Tensor) -> Evaluation:
    """The boxes of a microbatch's answers, one to each prompt, beside the true ones."""
    reading = scoring.read(ids, lengths)
    valid = reading.valid.cpu()
    score = torch.where(reading.valid, iou(reading.box, batch.target), 0.0).cpu()
    box = (reading.box.cpu() / torch.stack([prompt.scale for prompt in batch.prompts])) * valid[:, None]
    return Evaluation(box, valid, score, ())
