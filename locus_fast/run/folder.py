"""A run's folder: what lies in it by name, making it, and what to say of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch

from locus_fast.config import Config
from locus_fast.errors import UserError
from locus_fast.run.lock import holder_of, in_use, locked
from locus_fast.step.budget import NO_ROOM
from locus_fast.weights.checkpoint import checkpoints

METRICS, SUMMARY, CURVE, SAMPLES, FINAL = "metrics.jsonl", "summary.json", "curve.png", "samples.png", "final"


def make_folder(config: Config) -> Path:
    """Makes the run's folder; raises UserError if it is there already, unless it is to be resumed, or if it
    cannot be made. A folder that is not named takes the first free name of this second."""
    if config.resume:
        return Path(config.resume)
    default = Path("runs") / f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in count(1):
        out = Path(config.out or (default if number == 1 else f"{default}-{number}"))
        try:
            out.mkdir(parents=True)
            return out
        except FileExistsError:
            if config.out and (holder := holder_of(out)):
                raise in_use(out, holder) from None
            if config.out:
                raise UserError(f"--out {out} exists already; name a new folder, or remove it.") from None
        except OSError as error:
            what = f"--out {out} cannot be made ({error.strerror})"
            raise UserError(f"{what}; name a folder that can be written.") from None
    raise AssertionError("the numbers have no end")


@contextmanager
def run_folder(config: Config) -> Iterator[Path]:
    """The run's folder, made or to be resumed, held by this process alone. One that was made is removed again
    where the run ended before its first step. Raises UserError as `make_folder` and `locked` do, and for
    memory that the device does not have."""
    out, made = make_folder(config), not config.resume
    try:
        with locked(out):
            yield out
    except (UserError, torch.OutOfMemoryError) as error:
        if made and not (out / "checkpoints").exists():
            shutil.rmtree(out)  # the corrected command may use the name
        if isinstance(error, UserError):
            raise
        raise UserError(f"the device ran out of memory: {NO_ROOM}.") from None
    except KeyboardInterrupt:
        if made and not (out / "config.json").exists():
            shutil.rmtree(out)
        raise


def fresh(out: Path) -> str:
    """The way out that keeps a run's weights, in words."""
    found = checkpoints(out)
    return (
        f"start a new run with --model {out / FINAL if (out / FINAL).is_dir() or not found else found[-1][0]}"
    )


def kept_in(out: Path) -> str:
    """What a run's folder holds, in words."""
    found = checkpoints(out)
    parts = [f"{found[-1][0].relative_to(out)}"] if found else []
    parts += [f"{FINAL}/"] if (out / FINAL).is_dir() else []
    return f"{out} holds {' and '.join(parts)}" if parts else f"no checkpoint was saved in {out}"
