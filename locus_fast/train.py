"""LOCUS training, top to bottom: `python -m locus_fast.train` (with `--help` for every option).

A step, for each microbatch of whole groups:

    prompts -- prefill, gradients on, once a group --> keys and values of every layer, kept in the graph
        -> decode G replies on them -> token ids -> reward -> advantage
        -> one forward over all reply tokens on the same keys and values -> GRPO loss -> one backward, through replies and then prompts

and then one optimizer step. There is no second engine and no weight sync: the sampler is the policy. Left out on purpose: a value network,
partial groups, and any correction for a sampler that differs from the trainer.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import count as count_up
from pathlib import Path
from typing import Any

import torch
from locus_kernels.box_reward import BoxReward, box_reward
from torch import Tensor
from tqdm import tqdm

from locus_fast.config import Config, parse
from locus_fast.cost.flops import COLUMNS, PROMPT_ROWS, step_flops, total
from locus_fast.cost.shapes import Group
from locus_fast.errors import UserError
from locus_fast.evaluate import evaluate
from locus_fast.model.packing import PromptBatch, Replies
from locus_fast.model.policy import Prefix, checkpoint_activations, cut, prefill, reply_logprob, trains_vision
from locus_fast.model.prompts import Prompt
from locus_fast.model.reference import Reference, make_reference
from locus_fast.run.interrupt import Interrupt
from locus_fast.run.lock import holder_of, in_use, locked
from locus_fast.run.pictures import draw_curve, draw_samples
from locus_fast.run.report import Metrics
from locus_fast.run.resume import (
    CURVE,
    FINAL,
    SAMPLES,
    SUMMARY,
    Begun,
    check_layout,
    complete,
    kept_in,
    missing,
    open_metrics,
    read_run,
    remove_partial,
)
from locus_fast.run.saving import NOTHING, Saver, name_of
from locus_fast.run.setup import Setup, batches, prefetch, set_up
from locus_fast.step.budget import NO_ROOM, make_room, trained_by
from locus_fast.step.experience import Experience, parts, select
from locus_fast.step.losses import MEANS, grpo_loss
from locus_fast.step.metrics import Totals, summarise, why_no_signal
from locus_fast.step.optim import PARTS, clip_and_step, make_optimizer, parameter_groups, rate_factor
from locus_fast.step.rollout import Rollout, Sampling
from locus_fast.weights.checkpoint import damaged, load_checkpoint
from locus_fast.writing import write_text

EQUAL_STEPS = 10  # steps in a row whose rewards teach nothing before the run says so, once
DROPPED_STEPS = 5  # steps in a row without a finite gradient that end the run


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
    setup = set_up(config, out)
    model, done = setup.model, begun.done
    check_layout(setup.config, begun, model.dtype)
    lr_of = {part: config.lr * share for part, share in zip(PARTS, config.rates, strict=True)}
    optimizer = make_optimizer(config.optimizer, parameter_groups(model, lr_of), config.weight_decay)
    metrics = None if begun.checkpoint else open_metrics(config, out, begun)
    print(f"{setup.cues.describe()}; {out}\n{setup.plan.reason}", *setup.notes, sep="\n", file=sys.stderr)
    stop.promise = f"{NOTHING} it ends after the microbatch at hand"
    before = evaluate(setup, "held-out cues, before", stop)
    reference = make_reference(model, config.reference) if config.kl > 0 else None
    saver = Saver(setup, optimizer, out, stop, final_due=FINAL in lacking)
    if begun.checkpoint:
        load_checkpoint(begun.checkpoint, model, optimizer)
        if fault := saver.fault():
            raise damaged(begun.checkpoint, fault)
    metrics = metrics or open_metrics(config, out, begun)  # a run's own is not touched before all of it was found good
    (out / "checkpoints").mkdir(exist_ok=True)
    if setup.plan.checkpointing:
        checkpoint_activations(model, setup.plan.checkpointing)
    with closing(metrics):
        done = learn_and_save(setup, reference, optimizer, metrics, saver, done)
    stop.promise = f"{name_of(done)} and {FINAL}/ are saved already; it ends after the microbatch at hand"
    after = None if stop() else evaluate(setup, "held-out cues, after", stop)
    summary = {
        "eval": {"before": before.summary() if before else None, "after": after.summary() if after else None},
        "steps": done,
        "interrupted": after is None,
        "skipped_images": len(setup.skipped.sentences),
        "plan": {**asdict(setup.plan), "halved": setup.budget.halved},
        **metrics.throughput(),
        "total_seconds": time.perf_counter() - started,
    }
    stop.promise = "all is saved; only pictures are drawn now, and it ends then"
    write_text(out / SUMMARY, json.dumps(summary, indent=2))
    draw_curve(metrics.path, out / CURVE)
    if before and after:
        draw_samples(setup.cues, before, after, out / SAMPLES)
    return summary


def learn_and_save(setup: Setup, reference: Reference | None, optimizer: torch.optim.Optimizer, metrics: Metrics, saver: Saver, begun: int) -> int:
    """The steps after the first `begun`, each with its line of metrics, their state saved on the way and at
    the end, however that came. Returns how many steps are done then. Raises UserError for what ended the run
    early, and for a state that is not finite."""
    config, done = setup.config, begun
    failure: Exception | None = None
    try:
        saver.expect(done)
        for numbers in steps(setup, reference, optimizer, done, saver.stop):
            done = numbers["step"]
            saver.expect(done)
            metrics.write(numbers)
            if config.save_every and done % config.save_every == 0 and done < config.steps:
                metrics.sync()
                saver.checkpoint(done)
    except torch.OutOfMemoryError:
        failure = UserError(f"{setup.budget.too_small(setup.plan.checkpointing)}, and go on with --resume.")
    except Exception as error:
        failure = error
    metrics.sync()
    saver.end(begun, done, failure)
    return done


def steps(
    setup: Setup, reference: Reference | None, optimizer: torch.optim.Optimizer, done: int, stop: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """Runs the steps after the first `done` and yields each one's metrics, until the last one or until `stop` says so."""
    config = setup.config
    indices = range(done * config.prompts, config.steps * config.prompts)
    prompts = prefetch(lambda i: setup.prompter(setup.cues.train(i)), indices, config.workers, ahead=2 * config.prompts)
    dropped = in_a_row = equal = 0
    with closing(prompts), tqdm(total=config.steps, initial=done, desc="train", unit="step") as bar:
        for step in range(done, config.steps):
            setup.model.train()
            numbers = None if stop() else train_step(setup, reference, optimizer, prompts, step, stop)
            setup.model.eval()
            if numbers is None:
                return
            dropped += numbers["dropped_step"]
            in_a_row = in_a_row + 1 if numbers["dropped_step"] else 0
            show(bar, numbers, dropped)
            yield numbers
            equal = equal + 1 if numbers["zero_variance_groups"] == config.prompts else 0
            if equal == EQUAL_STEPS:
                tqdm.write(f"for {equal} steps {why_no_signal(numbers)}", file=sys.stderr)
            if in_a_row == DROPPED_STEPS:
                what = f"log-probs or gradient were not finite in {in_a_row} steps in a row up to step {step + 1}"
                raise UserError(f"{what}; lower --lr, or check the model's weights.")


def train_step(
    setup: Setup, reference: Reference | None, optimizer: torch.optim.Optimizer, prompts: Iterator[Prompt], step: int, stop: Callable[[], bool]
) -> dict[str, Any] | None:
    """Rollouts of one batch of prompts and its updates; the step's metrics, or None if `stop` said so before the first update."""
    config = setup.config
    clock = time.perf_counter()
    chunk = [next(prompts) for _ in range(config.prompts)]
    setup.skipped.add(chunk)
    waited = time.perf_counter() - clock
    done = setup.budget.retry(lambda: first_update(setup, reference, optimizer, chunk, step, stop), setup.decoder)
    if done is None:
        return None
    totals, experiences, denominator = done
    # a policy whose own log-probs are not numbers earns no reward, so it has no gradient to show it: the step is dropped as if its norm were none
    gone = torch.where(torch.as_tensor(totals.sums["not_finite"]) > 0, torch.nan, float(denominator))
    factor = rate_factor(step, config.steps, config.warmup, config.schedule)
    norms = []
    for again in range(config.updates):
        if again:
            totals.join(setup.budget.retry(lambda: further_update(setup, optimizer, experiences), setup.decoder))
        norms.append(update(setup, optimizer, gone, factor, config.seed + step * config.updates + again))
    totals.add(denominator=float(denominator * config.updates))
    return summarise(totals, chunk, step, torch.stack(norms), config.lr * factor, time.perf_counter() - clock, waited)


def update(setup: Setup, optimizer: torch.optim.Optimizer, denominator: Tensor, factor: float, seed: int) -> Tensor:
    """The optimizer's step, and where memory is short once more without the decoder's buffers: nothing has moved by then. The gradient's norm."""
    move = partial(clip_and_step, optimizer, denominator=denominator, factor=factor, clip=setup.config.grad_clip, seed=seed)
    try:
        return move()
    except torch.OutOfMemoryError:
        make_room(setup.decoder)
    try:
        return move()
    except torch.OutOfMemoryError:
        raise UserError(f"the optimizer's step found no memory: {NO_ROOM}, and go on with --resume.") from None


def first_update(
    setup: Setup, reference: Any, optimizer: torch.optim.Optimizer, chunk: list[Prompt], step: int, stop: Callable[[], bool]
) -> tuple[Totals, list[Experience], int] | None:
    """Rollouts of one batch of prompts and the gradient of their summed loss: (sums for the metrics, what further updates need, the denominator),
    or None if `stop` said so. Rollouts follow from the seed and the weights alone, so it can be done again."""
    config = setup.config
    totals, experiences = Totals(), []
    denominator = 0
    optimizer.zero_grad(set_to_none=True)
    most = setup.budget.shares([setup.most(prompt, config.replies) for prompt in chunk], setup.budget.rollout)
    for indices, batch in batches(setup, chunk, step * config.prompts, most, setup.budget.rollout):
        if stop():
            return None
        kept = sum(most[index - step * config.prompts] for index in indices) <= setup.budget.tokens
        with torch.set_grad_enabled(kept):
            prefix = prefill(setup.model, batch)  # the sampler's prefill is the training forward's prefix
        rollout = setup.decoder.generate(prefix, sampling_of(config), seed=config.seed, groups=indices)
        scored = score(setup, batch, rollout, step / config.steps)
        host = torch.cat([rollout.lengths, scored.zero_variance.long()]).tolist()  # the one readback of a microbatch
        tokens, equal = host[: len(rollout.ids)], host[len(rollout.ids) :]
        live = with_gradient(config, equal)
        lengths = [tokens[r : r + config.replies] for r in range(0, len(tokens), config.replies)]
        weight, share = MEANS[config.mean](rollout.lengths, tokens)
        denominator += share
        count(totals, batch, rollout, scored, tokens, sum(equal))
        whole = Experience(batch, rollout, lengths, live, scored.advantage, weight)
        reused = kept and pays(setup, whole)
        spend(setup, totals, whole, COLUMNS, again=not reused)
        held = [prefix] if reused else []
        del prefix  # a wide rollout's keys and values make room, and a microbatch's do before the next one's are made
        for part in [whole] if reused else parts(setup, whole):
            if part.live:
                experience = learn(setup, reference, part, held.pop() if held else prefill(setup.model, part.batch), totals)
                experiences += [experience] if config.updates > 1 else []
    return totals, experiences, denominator


def with_gradient(config: Config, zero_variance: Sequence[int]) -> list[int]:
    """The groups that have a gradient, given of each whether its rewards are all equal: all of them where there is a
    KL term, since an advantage of 0 has none but the KL has; unless such groups are to be skipped."""
    held = config.kl > 0 and not config.skip_zero_variance
    return [group for group, equal in enumerate(zero_variance) if held or not equal]


def pays(setup: Setup, whole: Experience) -> bool:
    """Whether the rollout's prefix should be trained on: its backward goes through flat groups' prompts too, to no end, and a forward pass of the
    live ones alone costs less where they are few."""
    prompts = [setup.cost(prompt, 0) for prompt in whole.batch.prompts]
    live = sum(prompts[group] for group in whole.live)
    return live >= (2 + (setup.plan.checkpointing > 0)) * (sum(prompts) - live)  # a backward is two forwards, and one more where it is recomputed


def further_update(setup: Setup, optimizer: torch.optim.Optimizer, experiences: list[Experience]) -> Totals:
    """The gradient of the same rollouts' loss at the weights as they are now: the prefix again, against the stored old log-probs. Returns what it
    adds to the metrics."""
    totals = Totals()
    optimizer.zero_grad(set_to_none=True)
    for whole in experiences:
        for experience in parts(setup, whole):
            prefix, onward = cut(prefill(setup.model, experience.batch))
            replies = Replies.of(experience.batch, experience.rollout.ids, experience.lengths, experience.live)
            logprob, _ = reply_logprob(setup.model, prefix, replies, setup.config.temperature)
            del prefix
            backward(setup.config, experience, replies, logprob, totals)
            onward()
            spend(setup, totals, experience, COLUMNS[1:4])
    return totals


def learn(setup: Setup, reference: Reference | None, experience: Experience, prefix: Prefix, totals: Totals) -> Experience:
    """Forward over the live groups' replies on the prefix, and the backward of the summed loss. Returns the live groups with what further updates
    on them need. The reference sees the live groups alone."""
    config = setup.config
    totals.add(cost=sum(setup.cost(prompt, sum(n)) for prompt, n in zip(experience.batch.prompts, experience.lengths, strict=True)))
    totals.add(room=float(setup.budget.tokens))
    replies = Replies.of(experience.batch, experience.rollout.ids, experience.lengths, experience.live)
    prefix, onward = cut(prefix)
    logprob, entropy = reply_logprob(setup.model, prefix, replies, config.temperature)
    alive, anchor = select(setup, experience, experience.live), None
    if reference is not None:
        with torch.no_grad(), reference.model() as base:
            shared = prefix.features if alive is experience and not trains_vision(setup.model) else None  # a frozen tower sees for both
            theirs = Replies.of(alive.batch, alive.rollout.ids, alive.lengths, alive.live)
            anchor, _ = reply_logprob(base, prefill(base, alive.batch, shared), theirs, config.temperature)
    del prefix
    backward(config, replace(experience, reference=anchor), replies, logprob, totals)
    onward()
    compare_with_sampler(totals, experience.rollout, replies, logprob.detach(), entropy)
    return replace(alive, old=logprob.detach(), reference=anchor)


def spend(setup: Setup, totals: Totals, experience: Experience, columns: Sequence[str], again: bool = False) -> None:
    """Counts the FLOPs of some passes over a microbatch from its shapes: the model's, those of the floor, and those spent. again: its live prompts
    are prefilled once more, apart from the flat ones."""
    groups = [
        Group(tuple((h, w) for _, h, w in prompt.grids.tolist()), len(prompt.ids), tuple(experience.lengths[b]), b in experience.live)
        for b, prompt in enumerate(experience.batch.prompts)
    ]
    passes: dict[str, Any] = {
        "checkpointing": setup.plan.checkpointing,
        "reference": setup.config.kl > 0,
        "trained": trained_by(setup.config),
    }
    floor = step_flops(setup.shape, groups, executed=False, **passes)
    packed = [[group for group in groups if group.live == live] for live in (True, False)] if again else [groups]
    tables = [step_flops(setup.shape, chosen, executed=True, **passes) for chosen in packed]
    prefills = sum(tables[0][row]["forward"] for row in PROMPT_ROWS) if again else 0
    totals.add(model_flops=total(floor, [column for column in columns if column != "recompute"]), floor_flops=total(floor, columns))
    totals.add(spent_flops=sum(total(table, columns) for table in tables) + prefills)


def sampling_of(config: Config) -> Sampling:
    return Sampling(config.replies, config.max_tokens, config.temperature, config.top_p)


def score(setup: Setup, batch: PromptBatch, rollout: Rollout, progress: float) -> BoxReward:
    """Box, validity, reward and group advantage of every reply, from token ids."""
    config = setup.config
    return box_reward(
        *setup.whole(rollout),
        setup.table,
        batch.target.repeat_interleave(config.replies, 0),
        group_size=config.replies,
        shape=config.reward,
        format_weight=config.format_weight,
        normalize_std=config.normalize_std,
        progress=progress,
        **setup.reading,
    )


def count(totals: Totals, batch: PromptBatch, rollout: Rollout, scored: BoxReward, lengths: list[int], equal: int) -> None:
    """A microbatch's share of the step's metrics. equal: its groups whose rewards are all the same."""
    totals.add(
        reward=scored.reward.sum(),
        iou=scored.iou.sum(),
        valid=scored.valid.sum(),
        format=scored.format_ok.sum(),
        not_finite=(~rollout.logprob.isfinite()).sum(),
        zero_variance=float(equal),
        replies=float(len(lengths)),
        reply_tokens=float(sum(lengths)),
        prompt_tokens=float(sum(batch.lengths)),
    )


def compare_with_sampler(totals: Totals, rollout: Rollout, replies: Replies, logprob: Tensor, entropy: Tensor) -> None:
    """How far the training forward's log-probs are from the sampler's, and the entropy, over T tokens."""
    gap = (logprob - rollout.logprob[replies.row, replies.place]).abs()
    totals.add(entropy=entropy.detach().sum(), sampler_gap=gap.sum(), live_tokens=float(len(gap)))
    totals.peak(sampler_gap_max=gap.amax())


def backward(config: Config, experience: Experience, replies: Replies, logprob: Tensor, totals: Totals) -> None:
    """Adds the gradient of the microbatch's summed loss."""
    loss, sums = grpo_loss(
        logprob,
        old=logprob if experience.old is None else experience.old,
        reference=experience.reference,
        advantage=experience.advantage[replies.row],
        weight=experience.weight[replies.row],
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        kl_coefficient=config.kl,
        log_ratio_clamp=config.log_ratio_clamp or math.inf,
        kl_clamp=config.kl_clamp or math.inf,
    )
    loss.backward()
    totals.peak(ratio_max=sums.pop("ratio_max"))
    totals.add(loss=loss.detach(), updated_tokens=float(len(logprob)), **sums)


def show(bar: tqdm, numbers: dict[str, Any], dropped: int) -> None:
    """A step's figures beside the bar, a dash for what it has not got, and how many steps were dropped so
    far, if any."""
    names = {"reward": "reward", "iou": "IoU", "valid": "valid", "kl": "KL", "grad_norm": "grad"}
    known = {label: numbers[name] for name, label in names.items()}
    text = {label: "-" if value is None or not math.isfinite(value) else f"{value:.3f}" for label, value in known.items()}
    rates = {"tok/s": f"{numbers['unique_tokens_per_s']:.0f}", "rollouts/s": f"{numbers['rollouts_per_s']:.0f}"}
    bar.set_postfix({**text, **({"dropped": dropped} if dropped else {}), **rates}, refresh=False)
    bar.update()


def run_folder(config: Config) -> Path:
    """Makes the run's folder; raises UserError if it is there already, unless it is to be resumed, or if it cannot be
    made. A folder that is not named takes the first free name of this second."""
    if config.resume:
        return Path(config.resume)
    default = Path("runs") / f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in count_up(1):
        out = Path(config.out or (default if number == 1 else f"{default}-{number}"))
        try:
            out.mkdir(parents=True)
            return out
        except FileExistsError:
            if config.out and (holder := holder_of(out)):
                raise in_use(out, holder) from None
            if config.out:
                raise UserError(f"--out {out} exists already; name a new folder, or remove it.") from None
        except OSError as error:
            raise UserError(f"--out {out} cannot be made ({error.strerror}); name a folder that can be written.") from None
    raise AssertionError("the numbers have no end")


def comparison(before: dict, after: dict) -> str:
    """The last line of a run."""
    change = after["mean_iou"] - before["mean_iou"]
    parts = [f"{name} {before[key]:.3f} -> {after[key]:.3f}" for name, key in (("Acc@0.5", "acc50"), ("Acc@0.75", "acc75"), ("valid", "valid"))]
    return f"held-out mean IoU {before['mean_iou']:.3f} -> {after['mean_iou']:.3f} ({change:+.3f}), {', '.join(parts)}, on {after['n']} cues"


def main(arguments: list[str]) -> int:
    """The command; returns the exit code: 0, 2 for a mistake in the input, 130 after Ctrl-C."""
    out, made = None, False
    try:
        with Interrupt(f"{NOTHING} it ends when it has started") as interrupt:
            config = parse(arguments)
            out, made = run_folder(config), not config.resume
            with locked(out):
                summary = train(config, out, interrupt)
    except (UserError, torch.OutOfMemoryError) as error:
        print(f"error: {error if isinstance(error, UserError) else f'the device ran out of memory: {NO_ROOM}.'}", file=sys.stderr)
        if out and made and not (out / "checkpoints").exists():
            shutil.rmtree(out)  # we made it and nothing was done: the mended command may use the name
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
