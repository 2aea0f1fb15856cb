"""What a run tells people: metrics as JSON lines and TensorBoard events, the progress bar, the last line. Its
pictures: `run.pictures`."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from locus_fast.errors import UserError
from locus_fast.files import write_text, written


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
        known = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in numbers.items()
        }
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
        return {
            "rollouts_per_s": self.rollouts / seconds,
            "unique_tokens_per_s": self.tokens / seconds,
            "training_seconds": self.seconds,
        }

    def close(self) -> None:
        self.file.close()
        if self.events:
            self.events.close()


def open_events(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard true needs the tensorboard package: pip install 'locus-fast[tensorboard]'."
        ) from None
    return SummaryWriter(str(folder))


class Progress:
    """The bar of a run's steps, and what is said of steps that teach nothing."""

    EQUAL_STEPS = 10  # steps in a row whose rewards teach nothing before the run says so, once
    DROPPED_STEPS = 5  # steps in a row without a finite gradient that end the run

    def __init__(self, bar: tqdm, prompts: int):
        """prompts: of a step."""
        self.bar, self.prompts = bar, prompts
        self.dropped = self.dropped_in_a_row = self.equal_in_a_row = 0

    def show(self, row: dict[str, Any]) -> None:
        """A step's figures beside the bar, a dash for what it has not got, and how many steps were dropped so
        far, if any."""
        self.dropped += row["dropped_step"]
        self.dropped_in_a_row = self.dropped_in_a_row + 1 if row["dropped_step"] else 0
        names = {"reward": "reward", "iou": "IoU", "valid": "valid", "kl": "KL", "grad_norm": "grad"}
        known = {label: row[name] for name, label in names.items()}
        text = {label: "-" if v is None or not math.isfinite(v) else f"{v:.3f}" for label, v in known.items()}
        rates = {"tok/s": f"{row['unique_tokens_per_s']:.0f}", "rollouts/s": f"{row['rollouts_per_s']:.0f}"}
        dropped = {"dropped": self.dropped} if self.dropped else {}
        self.bar.set_postfix({**text, **dropped, **rates}, refresh=False)
        self.bar.update()

    def check(self, row: dict[str, Any]) -> None:
        """Says once if steps in a row teach nothing. Raises UserError if too many were dropped in a row."""
        self.equal_in_a_row = self.equal_in_a_row + 1 if row["zero_variance_groups"] == self.prompts else 0
        if self.equal_in_a_row == self.EQUAL_STEPS:
            tqdm.write(f"for {self.equal_in_a_row} steps {why_no_signal(row)}", file=sys.stderr)
        if self.dropped_in_a_row == self.DROPPED_STEPS:
            what = f"log-probs or gradient were not finite in {self.dropped_in_a_row} steps in a row"
            raise UserError(f"{what} up to step {row['step']}; lower --lr, or check the model's weights.")


def why_no_signal(row: dict[str, Any]) -> str:
    """What to say of a step in which the replies of every group earned the same, and what may be done."""
    if row["valid"] == 0:
        why = (
            "no reply holds a box that can be read: the model may need another --prompt-style, or more "
            "--max-new-tokens"
        )
    elif row["iou"] == 0:
        why = (
            "no box touches its target: the model may speak other coordinates, or the cues be too hard for it"
        )
    else:
        why = (
            "each group's replies are alike: raise --temperature or --group-size, or give cues that are "
            "harder"
        )
    return f"all replies of a group have earned the same reward, so nothing is learned from it; {why}."


def comparison(before: dict, after: dict) -> str:
    """The last line of a run, from the summaries of both evaluations."""
    change = after["mean_iou"] - before["mean_iou"]
    figures = {"Acc@0.5": "acc50", "Acc@0.75": "acc75", "valid": "valid"}
    parts = [f"{name} {before[key]:.3f} -> {after[key]:.3f}" for name, key in figures.items()]
    iou = f"{before['mean_iou']:.3f} -> {after['mean_iou']:.3f} ({change:+.3f})"
    return f"held-out mean IoU {iou}, {', '.join(parts)}, on {after['n']} cues"
