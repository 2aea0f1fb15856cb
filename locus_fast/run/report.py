"""What a run leaves behind for people: metrics as JSON lines, and TensorBoard events. Its pictures: `locus_fast.run.pictures`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from locus_fast.errors import UserError
from locus_fast.writing import write_text, written


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
