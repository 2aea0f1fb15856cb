"""What a run leaves behind for people: metrics as JSON lines (and TensorBoard events), the curve, and pictures of what was found."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from locus_fast.errors import UserError
from locus_fast.evaluate import Evaluation
from locus_fast.types import CueSource
from locus_fast.writing import write_text, written

PICTURES = 8  # held-out examples shown in samples.png
COLOURS = {"true box": "#00d060", "base": "#ff9500", "trained": "#ff2d78"}


class Metrics:
    """Appends a step's numbers to `metrics.jsonl`, flushed at once, and to TensorBoard where asked. What is
    not finite is written as null."""

    def __init__(self, folder: Path, tensorboard: bool, kept: Sequence[str] = ()):
        """kept: the lines of an earlier part of the run, all that the file holds then."""
        self.path = folder / "metrics.jsonl"
        self.events = open_events(folder) if tensorboard else None
        write_text(self.path, "".join(kept))
        self.file = self.path.open("a", encoding="utf-8")
        self.rollouts = self.tokens = self.seconds = 0.0
        for line in kept:
            self._sum(json.loads(line))

    def write(self, numbers: dict[str, Any]) -> None:
        known = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in numbers.items()}
        with written(self.path):
            self.file.write(json.dumps(known) + "\n")
            self.file.flush()
        self._sum(known)
        if self.events:
            for name, value in known.items():
                if value is not None:
                    self.events.add_scalar(name, value, known["step"])

    def sync(self) -> None:
        """Puts what was written on the disk: a checkpoint should not outlive the lines of its steps in a
        power cut. A file system that cannot is no reason to stop."""
        with suppress(OSError):
            os.fsync(self.file.fileno())

    def _sum(self, numbers: dict[str, Any]) -> None:
        """A line that was torn has no figures."""
        seconds = numbers.get("seconds") or 0.0
        self.seconds += seconds
        self.rollouts += (numbers.get("rollouts_per_s") or 0.0) * seconds
        self.tokens += (numbers.get("unique_tokens_per_s") or 0.0) * seconds

    def throughput(self) -> dict[str, float]:
        """Over the steps written: a prompt's tokens are counted once, whatever the number of its replies."""
        seconds = max(self.seconds, 1e-9)
        return {"rollouts_per_s": self.rollouts / seconds, "unique_tokens_per_s": self.tokens / seconds, "training_seconds": self.seconds}

    def close(self) -> None:
        self.file.close()
        if self.events:
            self.events.close()


def open_events(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard true needs the tensorboard package: pip install 'locus-fast[tensorboard]'.") from None
    return SummaryWriter(str(folder))


def read_rows(metrics: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl for a plot: NaN, which leaves a gap, for every figure that a line has not
    got."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: math.nan if row.get(name) is None else row[name] for name in names} for row in rows]


def draw_curve(metrics: Path, path: Path) -> None:
    """Reward, IoU and valid rate of the rollouts, and KL and gradient norm, over the steps."""
    rows = read_rows(metrics)
    if not rows:
        return
    plt = pyplot()
    step = [row["step"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name in ("reward", "iou", "valid"):
        left.plot(step, [row[name] for row in rows], label=name)
    left.set(xlabel="step", title="rollouts", ylim=(0, 1.02))
    left.legend()
    right.plot(step, [row["kl"] for row in rows], label="KL to the base, nats a token")
    right.plot(step, [row["grad_norm"] for row in rows], label="gradient norm")
    right.set(xlabel="step", title="update")
    if any(row["kl"] > 0 or row["grad_norm"] > 0 for row in rows):
        right.set_yscale("log")
    right.legend()
    figure.tight_layout()
    with written(path):
        figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_samples(cues: CueSource, before: Evaluation, after: Evaluation, path: Path) -> None:
    """Held-out images with the true box, the base's box and the trained box; the cue beside each."""
    plt = pyplot()
    count = min(PICTURES, cues.held_out_count)
    chosen = np.linspace(0, cues.held_out_count - 1, count).round().astype(int).tolist()
    columns = min(4, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.9 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, chosen, strict=False):
        example = cues.held_out(index)
        axis.imshow(example.image)
        for name, box in (("true box", example.box), ("base", before.box[index].tolist()), ("trained", after.box[index].tolist())):
            if box[2] > box[0] and box[3] > box[1]:
                corner, width, height = (box[0] - 0.5, box[1] - 0.5), box[2] - box[0], box[3] - box[1]
                style = {"edgecolor": COLOURS[name], "linewidth": 2, "linestyle": "-" if name == "true box" else "--"}
                axis.add_patch(plt.Rectangle(corner, width, height, fill=False, **style))
        axis.set_title(f"IoU {before.iou[index]:.2f} to {after.iou[index]:.2f}", fontsize=11)
        inset = axis.inset_axes((1.03, 0.72, 0.26, 0.28))
        inset.imshow(example.cue)
        inset.set(xticks=[], yticks=[])
    handles = [plt.Line2D([], [], color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
    figure.subplots_adjust(left=0.01, right=0.94, bottom=0.07, top=0.95, wspace=0.36, hspace=0.12)
    with written(path):
        figure.savefig(path, dpi=80)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
