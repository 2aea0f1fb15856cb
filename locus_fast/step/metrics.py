"""What a step adds up over its microbatches, on the device, and the metrics that it makes of them with one readback."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from locus_fast.cost.flops import rates
from locus_fast.model.prompts import Prompt


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

    def read(self, **more: Tensor) -> dict[str, float]:
        """Everything as numbers, `more` included: one readback."""
        values = {**self.sums, **self.peaks, **more}
        on_device = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        numbers = torch.stack([value.double() for value in on_device.values()]).tolist()
        return {**{name: float(value) for name, value in values.items() if name not in on_device}, **dict(zip(on_device, numbers, strict=True))}


def summarise(totals: Totals, chunk: list[Prompt], step: int, norms: Tensor, rate: float, seconds: float, waited: float) -> dict[str, Any]:
    """The step's metrics; norms [updates]. Those that depend on time: seconds, wait_seconds, mfu and the ones that end in _per_s."""
    began = time.perf_counter()
    sums = totals.read(norm=norms[-1] + 0 * norms.sum())  # not finite if one of them is not
    seconds += time.perf_counter() - began  # until the device had done the step
    dropped = sums["not_finite"] > 0 or not math.isfinite(sums["norm"])
    replies, live, updated = sums["replies"], sums.get("live_tokens", 0.0), max(1.0, sums.get("updated_tokens", 0.0))
    return {
        "step": step + 1,
        **{name: sums[name] / replies for name in ("reward", "iou", "valid", "format")},
        "reply_tokens": sums["reply_tokens"] / replies,
        "zero_variance_groups": int(sums["zero_variance"]),
        "loss": sums.get("loss", 0.0) / sums["denominator"],  # the objective, the mean over the updates
        "kl": sums.get("kl", 0.0) / updated,
        "entropy": sums["entropy"] / live if live else None,  # None: no group had a gradient, so no training forward was run
        "clip_low": sums.get("clip_low", 0.0) / updated,
        "clip_high": sums.get("clip_high", 0.0) / updated,
        "ratio_clamped": sums.get("ratio_clamped", 0.0) / updated,
        "kl_clamped": sums.get("kl_clamped", 0.0) / updated,
        "ratio_max": sums.get("ratio_max", 1.0),
        "sampler_gap": sums["sampler_gap"] / live if live else None,
        "sampler_gap_max": sums.get("sampler_gap_max"),
        "grad_norm": None if dropped else sums["norm"],
        "dropped_step": dropped,
        "lr": rate,
        "skipped_images": sum(len(prompt.skipped) for prompt in chunk),
        "seconds": seconds,
        "wait_seconds": waited,
        "unique_tokens_per_s": (sums["prompt_tokens"] + sums["reply_tokens"]) / seconds,
        "rollouts_per_s": replies / seconds,
        "fill": sums.get("cost", 0.0) / max(1.0, sums.get("room", 0.0)),
        "flops": sums["spent_flops"],
        "flops_over_floor": sums["spent_flops"] / sums["floor_flops"],
        **rates(sums["model_flops"], seconds, torch.cuda.get_device_name() if norms.is_cuda else "cpu"),
    }


def why_no_signal(numbers: dict[str, Any]) -> str:
    """What to say of a step in which the replies of every group earned the same, and what may be done."""
    if numbers["valid"] == 0:
        why = "no reply holds a box that can be read: the model may need another --question, or more --max-tokens"
    elif numbers["iou"] == 0:
        why = "no box touches its target: the model may speak other coordinates, or the cues be too hard for it"
    else:
        why = "each group's replies are alike: raise --temperature or --replies, or give cues that are harder"
    return f"all replies of a group have earned the same reward, so nothing is learned from it; {why}."
