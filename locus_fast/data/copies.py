"""Which image files hold the same bytes: copies, and hard or symbolic links to one file.

Reading a whole data set to hash it takes minutes, so files are told apart as cheaply as they can be: by size,
then by a hash of their last 4 KiB (coded pixels, where the first ones may be a header that many files share),
and only what agrees in both is hashed whole. An image that was encoded again, in another format or quality,
has other bytes and is another image.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_TAIL = 4096  # bytes
_THREADS = 16  # they wait for the disk or the network, not for a core
_CHUNK = 256  # files a task

Key = Hashable | None  # None for a file that cannot be read: it is nothing's copy


def first_copies(paths: Sequence[Path]) -> np.ndarray:
    """For each file the place of the first one with the same bytes, int32 [m]; its own place if there is
    none, or if it cannot be read. Costs a stat for each file, a read of 4 KiB where sizes agree, and a whole
    one where those agree too."""
    first = np.arange(len(paths), dtype=np.int32)
    groups = [list(range(len(paths)))]
    with ThreadPoolExecutor(_THREADS) as pool:
        for key_of in (_size, _tail, _whole):
            groups = _split(groups, paths, key_of, pool)
    for group in groups:
        first[group] = group[0]
    return first


def _split(
    groups: list[list[int]], paths: Sequence[Path], key_of: Callable[[Path], Key], pool: ThreadPoolExecutor
) -> list[list[int]]:
    """Each group of places split by its files' keys; groups of one are left out."""
    places = [place for group in groups for place in group]
    chunks = [places[start : start + _CHUNK] for start in range(0, len(places), _CHUNK)]
    keys = [
        key
        for part in pool.map(lambda chunk: [key_of(paths[place]) for place in chunk], chunks)
        for key in part
    ]
    alike: defaultdict[tuple[int, Key], list[int]] = defaultdict(list)
    numbers = (number for number, group in enumerate(groups) for _ in group)
    for place, number, key in zip(places, numbers, keys, strict=True):
        if key is not None:
            alike[number, key].append(place)
    return [group for group in alike.values() if len(group) > 1]


def _size(path: Path) -> Key:
    try:
        return os.stat(path).st_size or None  # empty files are not images
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None


def _tail(path: Path) -> Key:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return hashlib.sha256(file.read(_TAIL)).digest()
    except OSError:
        return None


def _whole(path: Path) -> Key:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None
