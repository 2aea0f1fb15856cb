"""LOCUS training: `python -m locus_fast.train` (with `--help` for every option).

A run, top to bottom: what there is already, model and data, the base's answers to held-out cues, the steps, what is
saved, the trained model's answers. The algorithm is in `step/step.py`, its loss in `step/losses.py`.

There is no second engine and no weight sync: the sampler is the policy. Left out on purpose: a value network, partial
groups, and any correction for a sampler that differs from the trainer.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from locus_fast.startup import answer_help, start

    start()
    from locus_fast.config import parse

    answer_help(parse)

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from locus_fast.config import Config, parse
from locus_fast.errors import UserError
from locus_fast.files import write_text
from locus_fast.model.families import PARTS
from locus_fast.model.policy import checkpoint_activations
from locus_fast.model.reference import make_reference
from locus_fast.run.evaluation import Evaluation, evaluate
from locus_fast.run.folder import CURVE, FINAL, SAMPLES, SUMMARY, kept_in, make_folder
from locus_fast.run.inputs import Inputs
from locus_fast.run.interrupt import Interrupt
from locus_fast.run.lock import locked
from locus_fast.run.pictures import draw_curve, draw_samples
from locus_fast.run.report import Metrics, Progress, comparison
from locus_fast.run.resume import Begun, check_layout, complete, missing, open_metrics, read_run, remove_partial
from locus_fast.run.saving import NOTHING, Saver, name_of
from locus_fast.run.setup import Setup, set_up
from locus_fast.step.budget import NO_ROOM
from locus_fast.step.optim import parameter_groups
from locus_fast.step.optimizers import make_optimizer
from locus_fast.step.step import Step
from locus_fast.weights.checkpoint import damaged, load_checkpoint


def train(config: Config, out: Path, stop: Interrupt) -> dict[str, Any]:
    """One run into the folder `out`, or what is missing of one; returns the summary. `stop` is asked between
    microbatches, and told what a Ctrl-C would do. Whatever ends the run but a third Ctrl-C, what was done is saved."""
    started = time.perf_counter()
    begun = read_run(config) if config.resume else Begun()
    lacking = missing(config, begun) if begun.checkpoint else ["steps", FINAL]
    if config.resume:
        remove_partial(out)
    if not {*lacking} - {CURVE}:
        return complete(config, begun, lacking)
    setup = set_up(config, out)
    engine, model = setup.engine, setup.engine.model
    check_layout(setup.config, begun, model.dtype)
    rates = {part: config.lr * share for part, share in zip(PARTS, config.lr_scale, strict=True)}
    optimizer = make_optimizer(config.optimizer, parameter_groups(model, rates), config.weight_decay)
    metrics = None if begun.checkpoint else open_metrics(config, out, begun)
    print(out, *setup.notes, sep="\n", file=sys.stderr)
    stop.promise = f"{NOTHING} it ends after the microbatch at hand"
    before = answers(setup, "held-out cues, before", stop)
    reference = make_reference(model, config.reference) if config.kl_coef > 0 else None
    saver = Saver(setup, optimizer, out, stop, final_due=FINAL in lacking)
    if begun.checkpoint:
        load_checkpoint(begun.checkpoint, model, optimizer)
        if fault := saver.fault():
            raise damaged(begun.checkpoint, fault)
    metrics = metrics or open_metrics(config, out, begun)  # a run's own is not touched before all of it was found good
    (out / "checkpoints").mkdir(exist_ok=True)
    if engine.plan.checkpointing:
        checkpoint_activations(model, engine.plan.checkpointing)
    step = Step(setup.config, engine, setup.scoring, reference, optimizer)
    with closing(metrics):
        done = learn_and_save(config, step, setup.inputs, metrics, saver, begun.done)
    stop.promise = f"{name_of(done)} and {FINAL}/ are saved already; it ends after the microbatch at hand"
    after = None if stop() else answers(setup, "held-out cues, after", stop)
    summary = {
        "eval": {"before": before.summary() if before else None, "after": after.summary() if after else None},
        "steps": done,
        "interrupted": after is None,
        "skipped_images": len(setup.inputs.skipped.sentences),
        "plan": {**asdict(engine.plan), "halved": engine.budget.halved},
        **metrics.throughput(),
        "total_seconds": time.perf_counter() - started,
    }
    stop.promise = "all is saved; only pictures are drawn now, and it ends then"
    write_text(out / SUMMARY, json.dumps(summary, indent=2))
    draw_curve(metrics.path, out / CURVE)
    if before and after:
        draw_samples(setup.inputs.cues, before, after, out / SAMPLES)
    return summary


def answers(setup: Setup, label: str, stop: Interrupt) -> Evaluation | None:
    """The model's answers to the held-out cues as it is now, None if `stop` said so."""
    return evaluate(setup.config, setup.engine, setup.inputs, setup.scoring, label, stop)


def learn_and_save(config: Config, step: Step, inputs: Inputs, metrics: Metrics, saver: Saver, begun: int) -> int:
    """The steps after the first `begun`, each with its line of metrics, their state saved on the way and at the end,
    however that came. Returns how many steps are done then. Raises UserError for what ended the run early, and for a
    state that is not finite."""
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
    """Runs the steps after the first `done` and yields each one's metrics, until the last one or until `stop` says
    so."""
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
    out, made = None, False
    try:
        with Interrupt(f"{NOTHING} it ends when it has started") as interrupt:
            config = parse(arguments)
            out, made = make_folder(config), not config.resume
            with locked(out):
                summary = train(config, out, interrupt)
    except (UserError, torch.OutOfMemoryError) as error:
        why = error if isinstance(error, UserError) else f"the device ran out of memory: {NO_ROOM}."
        print(f"error: {why}", file=sys.stderr)
        if out and made and not (out / "checkpoints").exists():
            shutil.rmtree(out)  # we made it and nothing was done: the corrected command may use the name
        return 2
    except KeyboardInterrupt:
        print(f"stopped at once; {kept_in(out) if out else 'nothing was done'}", file=sys.stderr)
        if out and made and not (out / "config.json").exists():
            shutil.rmtree(out)
        return 130
    if summary["interrupted"]:
        print(f"interrupted after {summary['steps']} steps; {kept_in(out)}; go on with --resume", file=sys.stderr)
        return 130
    print(f"run folder: {out}")
    print(comparison(summary["eval"]["before"], summary["eval"]["after"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
