"""What a run leaves besides weights: its summary, its pictures, and its last line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from locus_fast.files import write_text
from locus_fast.run.evaluation import Evaluation
from locus_fast.run.folder import CURVE, SAMPLES, SUMMARY
from locus_fast.run.pictures import draw_curve, draw_samples
from locus_fast.run.report import Metrics
from locus_fast.run.setup import Setup


def summarise(
    out: Path, setup: Setup, metrics: Metrics, done: int, answers: Sequence[Evaluation | None], seconds: float
) -> dict[str, Any]:
    """Writes a run's summary and pictures into its folder, and returns the summary. answers: to the held-out
    cues before and after `done` steps, None where it was told to end; seconds: that the whole run took."""
    before, after = answers
    summary = {
        "eval": {
            when: each.summary() if each else None for when, each in (("before", before), ("after", after))
        },
        "steps": done,
        "interrupted": after is None,
        "skipped_images": len(setup.inputs.skipped.sentences),
        "plan": {**asdict(setup.engine.plan), "halved": setup.engine.budget.halved},
        **metrics.throughput(),
        "total_seconds": seconds,
    }
    write_text(out / SUMMARY, json.dumps(summary, indent=2))
    draw_curve(metrics.path, out / CURVE)
    if before and after:
        draw_samples(setup.inputs.cues, before, after, out / SAMPLES)
    return summary
