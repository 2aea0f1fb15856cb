"""Files that a user names and files that a run leaves: what would never end when it is read, and who may
read what is written."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from locus_fast.errors import UserError, short

ENDLESS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # types of files whose reading may wait for ever


def refuse_endless(path: Path, option: str = "") -> None:
    """Raises UserError if `path`, links followed, is a pipe, a socket or a device: reading it might never
    end.

    option: whose value it is, such as "--data"; what may not be looked at is then refused too. What is not
    there is left to whoever reads it.
    """
    name = f"{option} {short(path)}".lstrip()
    try:
        kind = ENDLESS.get(stat.S_IFMT(path.stat().st_mode))
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        if not option:
            return
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{name} cannot be looked at ({why}): correct the name or its permissions.") from None
    if kind:
        raise UserError(f"{name} is {kind}, not a file or a folder: replace it by a file.")


def refuse_endless_in(folder: Path, *, deep: bool = False) -> None:
    """The same for every file in a folder; deep: and in the folders in it, which links are not followed
    to."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        refuse_endless(Path(entry.path))
        if deep and entry.is_dir(follow_symlinks=False):
            refuse_endless_in(Path(entry.path), deep=True)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file or no object in it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file that those may read whom the umask lets read any other: safetensors lets the
    owner alone."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(dict(tensors), file, metadata=dict(metadata) if metadata else None)
    file.chmod(mode)
