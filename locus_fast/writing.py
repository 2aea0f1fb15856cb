"""Files and folders that are there whole or not at all, with checksums of what was written."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from locus_fast.errors import UserError

BLOCK = 1 << 22  # bytes read at a time


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
        raise UserError(f"{folder} could not be written: {error.strerror or error} ({error.filename or partial}).") from None
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
