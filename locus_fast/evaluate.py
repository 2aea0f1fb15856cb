"""Cue search on held-out data: `python -m locus_fast.evaluate MODEL --data ...`. Greedy replies, mean IoU and accuracies, by size class."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from locus_kernels.box_reward import iou, read_boxes
from tqdm import tqdm

from locus_fast.config import ASKED, Config, of_run, resolve, shown
from locus_fast.errors import UserError
from locus_fast.model.policy import prefill
from locus_fast.model.prompts import Prompt
from locus_fast.options import Parser, add_options, given, option_of
from locus_fast.run.folders import refuse_run, run_around
from locus_fast.run.interrupt import Interrupt
from locus_fast.run.setup import Setup, batches, prefetch, set_up
from locus_fast.step.rollout import Sampling

DESCRIPTION = "Ask a model for held-out cues, greedily: a table, and one line of JSON."
SIZES = ("tiny", "small", "large")
BATCHES_AHEAD = 64  # prompts packed at a time


@dataclass(frozen=True)
class Evaluation:
    """Greedy answers to n held-out cues. Boxes are xyxy in pixels of the original image."""

    box: torch.Tensor  # float32 [n, 4], zeros where not valid
    valid: torch.Tensor  # bool [n]
    iou: torch.Tensor  # float32 [n], 0 where not valid
    size_class: tuple[str, ...]

    def summary(self) -> dict[str, float | int | dict]:
        """n, mean_iou, acc50, acc75, valid; and `by_size`, the same for each size class that occurs."""
        parts = {size: self._figures([s == size for s in self.size_class]) for size in SIZES if size in self.size_class}
        return {**self._figures([True] * len(self.size_class)), "by_size": parts}

    def _figures(self, chosen: list[bool]) -> dict[str, float | int]:
        pick = torch.tensor(chosen)
        score, valid = self.iou[pick], self.valid[pick]
        figures = {"mean_iou": score, "acc50": (score >= 0.5).float(), "acc75": (score >= 0.75).float(), "valid": valid.float()}
        return {"n": sum(chosen), **{name: round(value.mean().item(), 6) for name, value in figures.items()}}


@torch.no_grad()
def evaluate(setup: Setup, label: str, stop: Callable[[], bool]) -> Evaluation | None:
    """Ask every held-out cue once, greedily. None if `stop` said so before the end.

    Raises UserError if the device's memory does not do, or if the model's log-probs are not finite."""
    count = setup.cues.held_out_count
    done: list[Evaluation] = []
    prompts = prefetch(lambda i: setup.prompter(setup.cues.held_out(i)), range(count), setup.config.workers, ahead=BATCHES_AHEAD)
    with closing(prompts), tqdm(total=count, desc=label, unit="cue", leave=False) as bar:
        for start in range(0, count, BATCHES_AHEAD):
            chunk = []
            for _ in range(min(BATCHES_AHEAD, count - start)):
                chunk.append(next(prompts))
                if stop():
                    return None
            setup.skipped.add(chunk)
            try:
                answered = setup.budget.retry(partial(answer, setup, chunk, start, stop), setup.decoder, "answering")
            except torch.OutOfMemoryError:
                raise UserError(f"{setup.budget.too_small(checkpointing=1)}.") from None
            if answered is None:
                return None
            done.append(answered)
            bar.update(len(chunk))
    return joined(done)


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of several, end to end."""
    box, valid, score = (torch.cat([getattr(part, name) for part in parts]) for name in ("box", "valid", "iou"))
    return Evaluation(box, valid, score, tuple(size for part in parts for size in part.size_class))


def answer(setup: Setup, chunk: list[Prompt], start: int, stop: Callable[[], bool]) -> Evaluation | None:
    """Greedy answers to held-out prompts, the first of which is cue `start`, in their order. None if `stop` said so between microbatches."""
    sampling = Sampling(replies=1, max_tokens=setup.config.max_tokens, temperature=0.0, top_p=1.0)
    done, order = [], []
    most = setup.budget.shares([setup.most(prompt, 1) for prompt in chunk], setup.budget.tokens)
    for indices, batch in batches(setup, chunk, start, most, setup.budget.tokens):
        if stop():
            return None
        rollout = setup.decoder.generate(prefill(setup.model, batch), sampling, seed=0, groups=indices)
        if not rollout.logprob.isfinite().all():
            what = f"{setup.config.model or 'the model'} answers held-out cues with log-probs that are not finite (NaN or infinite)"
            raise UserError(f"{what}: take other weights, or give --dtype float32.")
        reading = read_boxes(*setup.whole(rollout), setup.table, **setup.reading)
        valid, score = reading.valid.cpu(), torch.where(reading.valid, iou(reading.box, batch.target), 0.0).cpu()
        box = (reading.box.cpu() / torch.stack([p.scale for p in batch.prompts])) * valid[:, None]
        done.append(Evaluation(box, valid, score, ()))
        order += indices
    whole, place = joined(done), torch.tensor(order).argsort()
    return Evaluation(whole.box[place], whole.valid[place], whole.iou[place], tuple(prompt.size_class for prompt in chunk))


def table_of(summary: dict) -> str:
    """The summary as lines of text."""
    rows = [("all", summary), *summary["by_size"].items()]
    lines = [f"{'cues':<6} {'n':>5} {'mean IoU':>9} {'Acc@0.5':>8} {'Acc@0.75':>9} {'valid':>6}"]
    lines += [f"{name:<6} {r['n']:>5} {r['mean_iou']:>9.3f} {r['acc50']:>8.3f} {r['acc75']:>9.3f} {r['valid']:>6.3f}" for name, r in rows]
    return "\n".join(lines)


def parse(arguments: list[str]) -> tuple[Config, Path | None]:
    """(the configuration, the run folder whose settings it has) of a command line: that of the model's own run if it
    lies in one, with what is given besides. Raises UserError as `config.parse` does, and for an option that has no
    meaning here."""
    parser = Parser(prog="python -m locus_fast.evaluate", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("folder", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help="the same as --model")
    unused = Config.__dataclass_fields__.keys() - set(ASKED)
    add_options(parser, Config, shown, hidden=unused)
    words = given(parser, arguments)
    folder = words.pop("folder", None)
    if folder is not None and words.setdefault("model", folder) != folder:
        raise UserError(f"two models are named, {folder} and --model {words['model']}: give one.")
    if named := [name for name in words if name in unused]:
        raise UserError(f"{option_of(named[0])} has no meaning here, where nothing is trained and replies are greedy: leave it away.")
    model = Path(words.get("model", ""))
    run = run_around(model) if words.get("model") and model.is_dir() else None
    if run is None:
        return resolve(words), None
    refuse_run(model)
    return resolve(words, {name: value for name, value in of_run(run).items() if name in ASKED}), run


def asked(config: Config, run: Path | None) -> str:
    """What is asked of which model, in one line."""
    cues = f"up to {config.eval_cues:,} held-out cues of {config.data or 'drawn scenes'}"
    whose = f"as in the run {run}" if run else f"preset {config.preset}"
    return f"asking {config.model or 'the embedded tiny base'}: {cues}, question {config.question}, {whose}"


def main(arguments: list[str]) -> int:
    """The command: a table on standard error, the summary as one JSON line on standard output."""
    try:
        config, run = parse(arguments)
        with Interrupt() as interrupt:
            print(asked(config, run), file=sys.stderr)
            setup = set_up(config)
            print(setup.cues.describe(), file=sys.stderr)
            result = evaluate(setup, "evaluate", lambda: interrupt.requested)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if result is None:
        return 130
    print(table_of(result.summary()), file=sys.stderr)
    print(json.dumps({**result.summary(), "skipped_images": len(setup.skipped.sentences)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
