"""What a step adds up over its microbatches, on the device, and the metrics that it makes of them with one
readback."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from locus_kernels.box_reward import BoxReward
from torch import Tensor

from locus_fast.cost.flops import COLUMNS, PROMPT_ROWS, rates, step_flops, total
from locus_fast.cost.shapes import Group
from locus_fast.model.packing import Replies
from locus_fast.step.engine import Engine
from locus_fast.step.experience import Experience
from locus_fast.step.rollout import Rollout

# Columns of `cost.flops`: the passes of a step's first update, and of each further one on the same rollouts
FIRST_PASSES, FURTHER_PASSES = COLUMNS, ("forward", "recompute", "backward")


class Totals:
    """Sums over a step's microbatches, read back once at its end."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.peaks: dict[str, Tensor] = {}

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def peak(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.peaks[name] = torch.maximum(self.peaks[name], value) if name in self.peaks else value

    def join(self, other: Totals) -> None:
        """Adds what another has."""
        self.add(**other.sums)
        self.peak(**other.peaks)

    def add_rollout(self, experience: Experience, scored: BoxReward) -> None:
        """A microbatch's rollouts and what they earned."""
        rollout, lengths = experience.rollout, [n for group in experience.lengths for n in group]
        self.add(
            reward=scored.reward.sum(),
            iou=scored.iou.sum(),
            valid=scored.valid.sum(),
            format=scored.format_ok.sum(),
            not_finite=(~rollout.logprob.isfinite()).sum(),
            truncated=rollout.truncated.sum(),
            zero_variance=scored.zero_variance.sum(),
            replies=float(len(lengths)),
            reply_tokens=float(sum(lengths)),
            prompt_tokens=float(sum(experience.batch.lengths)),
        )

    def add_loss(self, loss: Tensor, tokens: int, sums: dict[str, Tensor], first: bool) -> None:
        """A microbatch's summed loss [] over so many tokens, and `sums`, as `losses.Objective` gives them.
        first: on the first update, whose entropy is that of the policy that sampled."""
        self.peak(ratio_max=sums["ratio_max"])
        self.add(loss=loss, updated_tokens=float(tokens))
        self.add(
            **{name: sums[name] for name in ("clip_low", "clip_high", "ratio_clamped", "kl_clamped", "kl")}
        )
        if first:
            self.add(entropy=sums["entropy"])

    def compare_with_sampler(self, rollout: Rollout, replies: Replies, logprob: Tensor) -> None:
        """How far the training forward's log-probs [T] are from the sampler's."""
        mismatch = (logprob - rollout.logprob[replies.row, replies.place]).abs()
        self.add(logprob_mismatch=mismatch.sum(), active_tokens=float(len(mismatch)))
        self.peak(logprob_mismatch_max=mismatch.amax())

    def read(self, **more: Tensor) -> dict[str, float]:
        """Everything as numbers, `more` included: one readback."""
        values = {**self.sums, **self.peaks, **more}
        on_device = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        numbers = torch.stack([value.double() for value in on_device.values()]).tolist()
        on_host = {name: float(value) for name, value in values.items() if name not in on_device}
        return {**on_host, **dict(zip(on_device, numbers, strict=True))}


def add_flops(
    totals: Totals,
    engine: Engine,
    experience: Experience,
    reference: bool,
    columns: Sequence[str],
    prefilled_again: bool = False,
) -> None:
    """Counts the FLOPs of some passes (columns of `cost.flops`) over a microbatch from its shapes: the
    model's, those of the floor, and those spent. prefilled_again: its active prompts once more, apart from
    the others."""
    groups = [
        Group(
            tuple((h, w) for _, h, w in prompt.grids.tolist()), len(prompt.ids), tuple(lengths), b in active
        )
        for active in [set(experience.active)]
        for b, (prompt, lengths) in enumerate(zip(experience.batch.prompts, experience.lengths, strict=True))
    ]
    passes: dict[str, Any] = {
        "checkpointing": engine.plan.checkpointing,
        "reference": reference,
        "trained": engine.trained,
    }
    floor = step_flops(engine.shape, groups, executed=False, **passes)
    apart = [[group for group in groups if group.active == active] for active in (True, False)]
    tables = [
        step_flops(engine.shape, chosen, executed=True, **passes)
        for chosen in (apart if prefilled_again else [groups])
    ]
    prefills = sum(tables[0][row]["forward"] for row in PROMPT_ROWS) if prefilled_again else 0
    useful = [column for column in columns if column != "recompute"]
    totals.add(model_flops=total(floor, useful), floor_flops=total(floor, columns))
    totals.add(spent_flops=sum(total(table, columns) for table in tables) + prefills)


def summarise(
    totals: Totals, step: int, norms: Tensor, lr: float, skipped: int, began: float
) -> dict[str, Any]:
    """The metrics of step `step` (from 0), which began at `began` by `time.perf_counter`; norms [updates];
    skipped: images. Those that depend on time: seconds, mfu and the ones that end in _per_s."""
    sums = totals.read(norm=norms[-1] + 0 * norms.sum())  # not finite if one of them is not
    seconds = time.perf_counter() - began  # until the device had done the step
    dropped = sums["not_finite"] > 0 or not math.isfinite(sums["norm"])
    replies, active = sums["replies"], sums.get("active_tokens", 0.0)
    updated = max(1.0, sums.get("updated_tokens", 0.0))
    per_update = ("kl", "clip_low", "clip_high", "ratio_clamped", "kl_clamped")
    return {
        "step": step + 1,
        **{
            name: sums[name] / replies
            for name in ("reward", "iou", "valid", "format", "reply_tokens", "truncated")
        },
        "zero_variance_groups": int(sums["zero_variance"]),
        "loss": sums.get("loss", 0.0) / sums["denominator"],  # the objective, the mean over the updates
        **{name: sums.get(name, 0.0) / updated for name in per_update},
        "ratio_max": sums.get("ratio_max", 1.0),
        "entropy": sums["entropy"] / active
        if active
        else None,  # None: no group was active, so nothing was trained on
        "logprob_mismatch": sums["logprob_mismatch"] / active if active else None,
        "logprob_mismatch_max": sums.get("logprob_mismatch_max"),
        "grad_norm": None if dropped else sums["norm"],
        "dropped_step": dropped,
        "lr": lr,
        "skipped_images": skipped,
        "seconds": seconds,
        "unique_tokens_per_s": (sums["prompt_tokens"] + sums["reply_tokens"]) / seconds,
        "rollouts_per_s": replies / seconds,
        "fill": sums.get("cost", 0.0) / max(1.0, sums.get("room", 0.0)),
        "flops": sums["spent_flops"],
        "flops_over_floor": sums["spent_flops"] / sums["floor_flops"],
        **rates(sums["model_flops"], seconds, torch.cuda.get_device_name() if norms.is_cuda else "cpu"),
    }
