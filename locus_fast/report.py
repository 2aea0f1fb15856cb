"""What a run leaves behind for people: metrics as JSON lines, and TensorBoard events. Its pictures: `locus_fast.pictures`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from locus_fast.errors import UserError


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
