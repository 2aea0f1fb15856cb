"""Files that a user names and files that a run leaves: what would never end when it is read, and who may read
what is written. What is written is there whole or not at all. Imports no PyTorch until a tensor is saved."""

from __future__ import annotations

import json
import os
import shutil
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locus_fast.errors import UserError, short

if TYPE_CHECKING:
    from torch import Tensor

# types of files whose reading may wait for ever
ENDLESS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
BLOCK = 1 << 22  # bytes read at a time


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


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file that those may read whom the umask lets read any other: safetensors lets the
    owner alone."""
    from safetensors.torch import save_file

    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(dict(tensors), file, metadata=dict(metadata) if metadata else None)
    file.chmod(mode)


@contextmanager
def whole_or_absent(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its name, and its place, when the block has ended well;
    otherwise it is removed. Raises UserError for what the system refuses."""
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{folder} could not be written: {error.strerror or error} ({error.filename or partial})."
        ) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def written(path: Path) -> Iterator[None]:
    """The block writes `path`: what the system refuses is a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}.") from None


def write_text(path: Path, text: str) -> None:
    """Text into a file, over what was there, which stays until the new one is whole."""
    partial = path.with_name(path.name + ".partial")
    with written(path):
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


class SummedFile:
    """A new file to write bytes to, and their CRC-32: a damaged disk is found out, a forger is not."""

    def __init__(self, path: Path):
        self.stream = path.open("wb")
        self.crc = 0

    def write(self, data: bytes | memoryview) -> None:
        self.stream.write(data)
        self.crc = zlib.crc32(data, self.crc)

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


def crc_of(path: Path) -> int:
    """The CRC-32 of a file's bytes."""
    crc, buffer = 0, bytearray(BLOCK)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            crc = zlib.crc32(memoryview(buffer)[:count], crc)
    return crc
