"""One process at a time trains into a run folder: a file lock that the system releases when its process ends,
however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from locus_fast.errors import UserError

NAME = "lock"  # in the run folder, while it is in use


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder as long as the block lasts. Raises UserError if another process does, or if nothing
    can be written there."""
    stream = _take(folder)
    try:
        stream.truncate(0)
        json.dump(
            {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")},
            stream,
        )
        stream.flush()
        yield
    finally:
        (folder / NAME).unlink(missing_ok=True)
        stream.close()


def holder_of(folder: Path) -> str | None:
    """Who holds the folder, in words, None for nobody."""
    try:
        with (folder / NAME).open("r+") as stream:  # some network file systems lock what may be written
            return None if _lock(stream) else _named(stream)
    except OSError:  # there is no such file
        return None


def in_use(folder: Path, holder: str) -> UserError:
    return UserError(f"{folder} is in use: {holder} trains into it; wait until it has ended, or end it.")


def _take(folder: Path) -> IO[str]:
    """The lock's file, open and locked."""
    path = folder / NAME
    while True:
        try:
            stream = path.open("a+")
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({error.strerror}): correct its permissions, or copy it to "
                "where it can."
            ) from None
        if not _lock(stream):
            with stream:
                raise in_use(folder, _named(stream))
        try:
            if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                return stream
        except FileNotFoundError:
            pass
        stream.close()  # its holder removed it between our opening and our locking


def _lock(stream: IO[str]) -> bool:
    """Whether the lock was free. A file system without locks is named, once, and counts as free."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        words = "run no second process on this folder, which nothing would stop"
        print(f"{stream.name} cannot be locked ({error.strerror}): {words}", file=sys.stderr)
    return True


def _named(stream: IO[str]) -> str:
    """The process that wrote the lock's file."""
    try:
        stream.seek(0)
        holder = json.load(stream)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun
        return "another process"
