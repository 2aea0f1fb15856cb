"""Whether a disk holds what a run will write, known before anything is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from locus_fast.config import Config
from locus_fast.errors import UserError
from locus_fast.model.families import shape_of
from locus_fast.run.plan import state_bytes, trained_by
from locus_fast.weights.shards import weight_files
from locus_fast.weights.source import Source

GIB = 1024**3


def check_disk(config: Config, source: Source, kind: torch.dtype, out: Path) -> None:
    """Raises UserError if the disk of the run folder `out` has no room for the checkpoints that are still to
    be written and for `final/`.

    A checkpoint is the weights in their dtype of training, `kind`, and the optimizer's state of those that
    are trained; adapters are not counted.
    """
    shape = shape_of(source.config)
    each = (
        0
        if config.lora
        else shape.parameters * kind.itemsize
        + trained_by(config).parameters(shape) * state_bytes(config, kind)
    )
    count = checkpoints_due(config, out)
    final = (
        sum(file.stat().st_size for file in weight_files(source.folder)) if config.export == "merged" else 0
    )
    free = shutil.disk_usage(out).free
    if final + count * each > free:
        parts = f"final/ {final / GIB:.2f}" + (
            f", {count} checkpoints of {each / GIB:.2f} each" if each else ""
        )
        fewer = " or save fewer checkpoints (--save-every)" if count > 1 and each else ""
        raise UserError(
            f"{out}: the run writes {(final + count * each) / GIB:.2f} GiB ({parts}), and its disk has "
            f"{free / GIB:.2f} GiB free: make room, name another disk with --out{fewer}."
        )


def checkpoints_due(config: Config, out: Path) -> int:
    """How many checkpoints the run is still to write: one each `save_every` steps and one at the end, less
    those that lie there."""
    every, last = config.save_every, config.steps
    there = [int(folder.name[5:]) for folder in (out / "checkpoints").glob("step-[0-9]*[0-9]")]
    done = [step for step in there if step == last or (every and 0 < step < last and step % every == 0)]
    return 1 + ((last - 1) // every if every else 0) - len(done)
