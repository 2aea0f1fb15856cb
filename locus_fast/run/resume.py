"""What an earlier part of a run left in its folder, judged before anything in it is changed, and what is
still missing there."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from locus_fast.config import Config, of_run, stored
from locus_fast.config.options import option_of
from locus_fast.config.presets import with_new_names
from locus_fast.errors import UserError
from locus_fast.files import write_text
from locus_fast.model.adapter_files import WEIGHTS, is_adapter_folder
from locus_fast.run.folder import CURVE, FINAL, METRICS, SAMPLES, SUMMARY, fresh
from locus_fast.run.pictures import draw_curve
from locus_fast.run.report import Metrics
from locus_fast.step.optimizers import default_optimizer
from locus_fast.weights.checkpoint import checkpoints, latest_checkpoint, trained_with, verify_checkpoint
from locus_fast.weights.shards import read_header, weight_files

FIGURES = ("n", "mean_iou", "acc50", "acc75", "valid")  # of an evaluation's summary
NUMBERS = ("seconds", "rollouts_per_s", "unique_tokens_per_s")  # of a line of metrics, for the throughput


@dataclass(frozen=True)
class Begun:
    """A run so far; as it stands, one that has not begun."""

    checkpoint: Path | None = None
    done: int = 0
    lines: Sequence[str] = ()  # of metrics.jsonl, one for each step done
    stored: dict[str, Any] = field(default_factory=dict)  # its settings
    summary: dict[str, Any] = field(default_factory=dict)


def read_run(config: Config) -> Begun:
    """The run that is to be resumed. Raises UserError, with nothing changed, for a folder that cannot be gone
    on with."""
    out = Path(config.resume)
    stored = of_run(out)
    _check_writable(out)
    if not checkpoints(out) and (out / METRICS).is_file() and not (out / FINAL).is_dir():
        print(f"{out}: it ended before its first checkpoint, so it begins again at step 1", file=sys.stderr)
        return Begun(stored=stored)
    checkpoint, done = latest_checkpoint(out)
    if done > config.steps:
        raise UserError(
            f"--resume {out}: it has done {done} steps, and --steps is {config.steps}; ask for more."
        )
    verify_checkpoint(checkpoint)
    return Begun(checkpoint, done, read_metrics(out / METRICS, done), stored, _summary(out))


def _check_writable(out: Path) -> None:
    """Raises UserError if the folder, or that of its checkpoints, cannot be written: the end of a run would
    be too late to say so."""
    for folder in (out, out / "checkpoints"):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"{folder} cannot be written: correct its permissions, or copy the run to where it can."
            )


def _summary(out: Path) -> dict[str, Any]:
    """summary.json, empty if it is not there or says nothing of use: it is then written again."""
    try:
        return dict(json.loads((out / SUMMARY).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def read_metrics(path: Path, done: int) -> list[str]:
    """The lines of the first `done` steps, each with its line end; those of later steps are left out, as
    these steps are done again.

    A torn last line, as a power cut leaves it, is replaced by one that has the step's number alone, and that
    is said. Raises UserError for a file that is missing, too short, not UTF-8, or not the metrics of these
    steps.
    """
    advice = f"restore the file from a copy, or {fresh(path.parent)}"
    try:
        raw = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {advice}.") from None
    kept = []
    for number, line in enumerate(raw[:done], start=1):
        try:
            text = line.decode("utf-8").strip()
            _check_line(json.loads(text), number)
        except (ValueError, RecursionError) as error:
            if number == len(raw) and not line.endswith(b"\n"):
                print(f"{path}: its last line, of step {number}, is torn and was dropped", file=sys.stderr)
                text = json.dumps({"step": number})
            else:
                raise UserError(
                    f"{path} line {number} is not the metrics of step {number} ({_first_line(error)}): "
                    f"{advice}."
                ) from None
        kept.append(text + "\n")
    if len(kept) < done:
        raise UserError(f"{path} has {len(kept)} lines, and {done} steps are done: {advice}.")
    return kept


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _check_line(row: Any, step: int) -> None:
    """Raises ValueError unless a line of metrics is that of this step."""
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    if row.get("step") != step:
        raise ValueError(f"its step is {row.get('step')!r}")
    for name in NUMBERS:
        if row.get(name) is not None and (
            not isinstance(row[name], int | float) or isinstance(row[name], bool)
        ):
            raise ValueError(f"its {name} is no number")


def remove_partial(out: Path) -> None:
    """Removes what a killed process had half written."""
    for folder in (out / f"{FINAL}.partial", *(out / "checkpoints").glob("*.partial")):
        shutil.rmtree(folder, ignore_errors=True)


def missing(config: Config, begun: Begun) -> list[str]:
    """What a run lacks of what it leaves when it has ended: "steps", "final", "summary.json" (with both
    evaluations), "samples.png", "curve.png"."""
    out = Path(config.resume)
    whole = begun.summary.get("steps") == begun.done and not begun.summary.get("interrupted")
    answered = begun.summary.get("eval")
    parts = [answered.get(when) for when in ("before", "after")] if isinstance(answered, dict) else [None]
    lacking = {
        "steps": begun.done < config.steps,
        FINAL: not has_final(config, begun),
        SUMMARY: not (
            whole and all(isinstance(part, dict) and part.keys() >= set(FIGURES) for part in parts)
        ),
        SAMPLES: not (out / SAMPLES).is_file(),
        CURVE: not (out / CURVE).is_file(),
    }
    return [name for name, is_missing in lacking.items() if is_missing]


def has_final(config: Config, begun: Begun) -> bool:
    """Whether `final/` is whole, of the last step done, and what the run is to export. It is written before
    summary.json, which says the step."""
    folder = Path(config.resume) / FINAL
    if begun.summary.get("steps") != begun.done or is_adapter_folder(folder) != (config.export == "adapter"):
        return False
    try:
        for file in [folder / WEIGHTS] if config.export == "adapter" else weight_files(folder):
            read_header(file)
    except (UserError, OSError):
        return False
    return True


def changed_options(config: Config, begun: Begun) -> list[str]:
    """The options that were given another value than the run has stored."""
    settings = vars(Config()) | begun.stored
    return [
        option_of(name)
        for name, value in vars(config).items()
        if name != "resume" and value != settings[name]
    ]


def complete(config: Config, begun: Begun, lacking: Sequence[str]) -> dict[str, Any]:
    """The summary of a run that was resumed and has ended already, which is said. At most its curve is drawn
    again."""
    out = Path(config.resume)
    if lacking:
        draw_curve(out / METRICS, out / CURVE)
    unused = ", ".join(changed_options(config, begun))
    unused = f", and {unused} changes nothing: give more --steps, or start a new run" if unused else ""
    found = f"{CURVE} was missing and is drawn again" if lacking else "nothing is missing"
    print(f"{out}: all of its {begun.done} steps are done, and {found}{unused}", file=sys.stderr)
    return begun.summary


def open_metrics(config: Config, out: Path, begun: Begun) -> Metrics:
    """The run's metrics, ready for the next step's, and its settings, written down."""
    metrics = Metrics(out, config.tensorboard, begun.lines)
    write_text(out / "config.json", json.dumps(stored(config), indent=2))
    return metrics


def layout_of(config: Config, kind: torch.dtype) -> dict[str, Any]:
    """The options that decide which tensors a checkpoint has. kind: the dtype of the model's weights."""
    optimizer = default_optimizer(config.optimizer, torch.float32 if config.lora else kind)
    return {
        "dtype": str(kind).removeprefix("torch."),
        "optimizer": optimizer,
        "lora": config.lora,
        "lr_scale": list(config.lr_scale),
    }


def check_layout(config: Config, begun: Begun, kind: torch.dtype) -> None:
    """Raises UserError if the checkpoint was trained with options that its tensors do not fit any more,
    naming the option and what can be done."""
    if begun.checkpoint is None:
        return
    was, now = trained_with(begun.checkpoint), layout_of(config, kind)
    was = was if was is None else with_new_names(was)
    if was is None:  # a checkpoint from before they were kept with it
        kept = ("optimizer", "lora", "lr_scale")  # the dtype that is stored may be "auto"
        was = {name: begun.stored[name] for name in kept if name in begun.stored}
        was["optimizer"] = default_optimizer(
            was.get("optimizer", "auto"), torch.float32 if config.lora else kind
        )
    for name, value in now.items():
        if name not in was or _same(name, was[name], value, config.lora):
            continue
        old, new = (" ".join(map(str, v)) if isinstance(v, list | tuple) else v for v in (was[name], value))
        back = (
            f"set lora to {old} in its config.json again"
            if name == "lora"
            else f"resume with {option_of(name)} {old}"
        )
        what = (
            f"its {begun.checkpoint.name} was trained with {option_of(name)} {old}, whose tensors are not "
            f"those of {option_of(name)} {new}"
        )
        raise UserError(f"--resume {config.resume}: {what}: {back}, or {fresh(Path(config.resume))}.")


def _same(name: str, was: Any, now: Any, lora: int) -> bool:
    """Whether two values of an option lead to the same tensors. Of lr_scale it counts which are 0, and with
    adapters only they are trained."""
    if name != "lr_scale" or not isinstance(was, list | tuple):
        return was == now
    return bool(lora) or [rate != 0 for rate in was] == [rate != 0 for rate in now]
