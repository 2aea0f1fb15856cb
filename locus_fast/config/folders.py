"""Run folders from the inside: whether a folder is a run's, or lies in one, and which of its models is meant.

RUN/config.json, metrics.jsonl, ...   the run: its settings, and no model
RUN/final/                            the model as exported
RUN/checkpoints/step-000100/          the model in the type it is trained in, or its adapters
"""

from __future__ import annotations

from pathlib import Path

from locus_fast.errors import UserError
from locus_fast.files import read_object

FINAL, CHECKPOINTS, PARTIAL = "final", "checkpoints", ".partial"


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run: its settings or its metrics, and not a model."""
    stated = read_object(folder / "config.json")
    return "model_type" not in stated and (
        "prompt_style" in stated or "question" in stated or (folder / "metrics.jsonl").is_file()
    )


def run_around(folder: Path) -> Path | None:
    """The run folder that a folder is, or lies in as RUN/final, RUN/checkpoints or RUN/checkpoints/step-N
    do, links followed; None if there is none."""
    folder = folder.resolve()
    candidates = [folder]
    if folder.name.removesuffix(PARTIAL) in (FINAL, CHECKPOINTS):
        candidates.append(folder.parent)
    if folder.parent.name == CHECKPOINTS:
        candidates.append(folder.parent.parent)
    return next((candidate for candidate in candidates if is_run(candidate)), None)


def refuse_run(folder: Path) -> None:
    """Raises UserError, with what to give instead, for a folder of a run that holds no whole model."""
    run, place = run_around(folder), folder.resolve()
    if run is None or (place not in (run, run / CHECKPOINTS) and not place.name.endswith(PARTIAL)):
        return
    # as it was given
    shown = folder if place == run else folder.parent if folder.name == CHECKPOINTS else run
    saved = sorted(
        (run / CHECKPOINTS).glob("step-[0-9]*[0-9]"), key=lambda folder: (len(folder.name), folder.name)
    )
    whole = [run / FINAL] * (run / FINAL).is_dir() + saved[-1:]
    if not whole:
        raise UserError(
            f"--model {folder} is of a run folder without a model yet: give a model in Hugging Face layout."
        )
    use = " or ".join(str(shown / each.relative_to(run)) for each in whole)
    what = (
        "was not written to its end" if place.name.endswith(PARTIAL) else "is a folder of a run, not a model"
    )
    raise UserError(f"--model {folder} {what}: use {use}.")
