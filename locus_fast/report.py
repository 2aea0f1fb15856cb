"""What a run leaves behind for people: metrics as JSON lines (and TensorBoard events), the curve, and pictures of what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from locus_fast.errors import UserError
from locus_fast.evaluate import Evaluation
from locus_fast.types import CueSource

PICTURES = 8  # held-out examples shown in samples.png
COLOURS = {"true box": "#00d060", "base": "#ff9500", "trained": "#ff2d78"}


class Metrics:
    """Appends a step's numbers to `metrics.jsonl`, flushed at once, and to TensorBoard where asked."""

    def __init__(self, folder: Path, tensorboard: bool, done: int):
        """done: steps of an earlier part of the run whose lines are kept; later ones are done again."""
        self.path = folder / "metrics.jsonl"
        kept = self.path.read_text().splitlines(keepends=True)[:done] if done else []
        self.path.write_text("".join(kept))
        self.file = self.path.open("a")
        self.events = open_events(folder) if tensorboard else None
        self.rollouts = self.tokens = self.seconds = 0.0
        for line in kept:
            self._sum(json.loads(line))

    def write(self, numbers: dict[str, Any]) -> None:
        self.file.write(json.dumps(numbers) + "\n")
        self.file.flush()
        self._sum(numbers)
        if self.events:
            for name, value in numbers.items():
                if value is not None:
                    self.events.add_scalar(name, value, numbers["step"])

    def _sum(self, numbers: dict[str, Any]) -> None:
        self.seconds += numbers["seconds"]
        self.rollouts += numbers["rollouts_per_s"] * numbers["seconds"]
        self.tokens += numbers["unique_tokens_per_s"] * numbers["seconds"]

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


def draw_curve(metrics: Path, path: Path) -> None:
    """Reward, IoU and valid rate of the rollouts, and KL and gradient norm, over the steps."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
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
    figure.savefig(path, dpi=80)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
