"""LOCUS training: `python -m locus_fast.train` (with `--help` for every option).

A run, top to bottom: what there is already, model and data, the base's answers to held-out cues, the steps,
what is saved, the trained model's answers. The algorithm is in `step/step.py`, its loss in `step/losses.py`.

There is no second engine and no weight sync: the sampler is the policy. Left out on purpose: a value network,
partial groups, and any correction for a sampler that differs from the trainer.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from locus_fast.startup import answer_help, start

    start()
    from locus_fast.config import parse

    answer_help(parse)

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from locus_fast.config import Config, parse
from locus_fast.errors import UserError
from locus_fast.run.ending import summarise
from locus_fast.run.folder import CURVE, FINAL, kept_in, run_folder
from locus_fast.run.inputs import Inputs
from locus_fast.run.interrupt import Interrupt
from locus_fast.run.report import Metrics, Progress, comparison
from locus_fast.run.resume import (
    Begun,
    check_layout,
    complete,
    missing,
    open_metrics,
    read_run,
    remove_partial,
)
from locus_fast.run.saving import NOTHING, Saver, name_of
from locus_fast.run.setup import set_up
from locus_fast.step.step import Step


def train(config: Config, out: Path, stop: Interrupt) -> dict[str, Any]:
    """One run into the folder `out`, or what is missing of one; returns the summary. `stop` is asked between
    microbatches, and told what a Ctrl-C would do. Whatever ends the run but a third Ctrl-C, what was done is
    saved."""
    started = time.perf_counter()
    begun = read_run(config) if config.resume else Begun()
    lacking = missing(config, begun) if begun.checkpoint else ["steps", FINAL]
    if config.resume:
        remove_partial(out)
    if not {*lacking} - {CURVE}:
        return complete(config, begun, lacking)
    # a new run's settings are written first, so that one that is killed while it starts can be resumed
    metrics = None if config.resume else open_metrics(config, out, begun)
    setup = set_up(config, out)
    check_layout(setup.config, begun, setup.engine.model.dtype)
    step = Step.of(setup.config, setup.engine, setup.scoring)
    metrics = metrics or (None if begun.checkpoint else open_metrics(config, out, begun))
    print(out, *setup.notes, sep="\n", file=sys.stderr)
    stop.promise = f"{NOTHING} it ends after the microbatch at hand"
    before = setup.evaluate("held-out cues, before", stop)
    step.begin()
    saver = Saver(setup, step.optimizer, out, stop, final_due=FINAL in lacking)
    saver.restore(begun.checkpoint)
    # a run's own is not touched before all of it was found good
    metrics = metrics or open_metrics(config, out, begun)
    (out / "checkpoints").mkdir(exist_ok=True)
    with closing(metrics):
        done = learn_and_save(config, step, setup.inputs, metrics, saver, begun.done)
    stop.promise = f"{name_of(done)} and {FINAL}/ are saved already; it ends after the microbatch at hand"
    after = None if stop() else setup.evaluate("held-out cues, after", stop)
    stop.promise = "all is saved; only pictures are drawn now, and it ends then"
    return summarise(out, setup, metrics, done, (before, after), time.perf_counter() - started)


def learn_and_save(
    config: Config, step: Step, inputs: Inputs, metrics: Metrics, saver: Saver, begun: int
) -> int:
    """The steps after the first `begun`, each with its line of metrics, their state saved on the way and at
    the end, however that came. Returns how many steps are done then. Raises UserError for what ended the run
    early, and for a state that is not finite."""
    done = begun
    failure: Exception | None = None
    try:
        saver.expect(done)
        for numbers in steps(config, step, inputs, done, saver.stop):
            done = numbers["step"]
            saver.expect(done)
            metrics.write(numbers)
            if config.save_every and done % config.save_every == 0 and done < config.steps:
                metrics.sync()
                saver.checkpoint(done)
    except torch.OutOfMemoryError:
        failure = UserError(f"{step.too_small()}, and go on with --resume.")
    except Exception as error:
        failure = error
    metrics.sync()
    saver.end(begun, done, failure)
    return done


def steps(config: Config, step: Step, inputs: Inputs, done: int, stop: Interrupt) -> Iterator[dict[str, Any]]:
    """Runs the steps after the first `done` and yields each one's metrics, until the last one or until `stop`
    says so."""
    numbers = range(done * config.prompts, config.steps * config.prompts)
    prompts = inputs.train(numbers, config.workers, ahead=2 * config.prompts)
    model = step.engine.model
    with closing(prompts), tqdm(total=config.steps, initial=done, desc="train", unit="step") as bar:
        progress = Progress(bar, config.prompts)
        for number in range(done, config.steps):
            if stop():
                return
            model.train()
            began = time.perf_counter()
            chunk = [next(prompts) for _ in range(config.prompts)]
            waited = time.perf_counter() - began
            inputs.skipped.add(chunk)
            row = step(chunk, number, began, stop)
            model.eval()
            if row is None:
                return
            row["wait_seconds"] = waited
            progress.show(row)
            yield row
            progress.check(row)


def main(arguments: list[str]) -> int:
    """The command; returns the exit code: 0, 2 for a mistake in the input, 130 after Ctrl-C."""
    out = None
    try:
        with Interrupt(f"{NOTHING} it ends when it has started") as interrupt:
            config = parse(arguments)
            with run_folder(config) as out:
                summary = train(config, out, interrupt)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped at once; {kept_in(out) if out else 'nothing was done'}", file=sys.stderr)
        return 130
    if summary["interrupted"]:
        print(
            f"interrupted after {summary['steps']} steps; {kept_in(out)}; go on with --resume",
            file=sys.stderr,
        )
        return 130
    print(f"run folder: {out}")
    print(comparison(summary["eval"]["before"], summary["eval"]["after"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
