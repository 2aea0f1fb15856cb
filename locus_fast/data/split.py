"""Which pictures are held out. A picture is what a file shows, whatever its names: copies of a file are one
picture, and fall on one side. Below, a choice is what an example is made of: a box of the table, or for a
table without boxes an image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from locus_fast.data import BoxTable
from locus_fast.data.cutting import SIZE_CLASSES

_HELD_OUT_PART = 0.2  # of the pictures, at most


@dataclass(frozen=True)
class Split:
    """Both sides. Pictures are named by the row of their first copy."""

    held_pictures: np.ndarray  # [p], none of which is trained on
    held_choices: np.ndarray  # [held], one for each held-out example
    held_count: int  # examples: without boxes a choice serves any number of them
    pools: list[np.ndarray]  # for each size class the choices to train on


def ranked_pictures(table: BoxTable, pictures: np.ndarray) -> np.ndarray:
    """The pictures in the order of a hash of their names, which no seed, folder or order in the file changes;
    of several names the one that comes first counts."""
    wanted = set(pictures.tolist())
    keys: dict[int, bytes] = {}
    for picture, name in zip(table.first_copy.tolist(), table.names, strict=True):
        if picture in wanted:
            key = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
            keys[picture] = min(key, keys.get(picture, key))
    return np.array(sorted(keys, key=keys.__getitem__), np.int64)


def split_images(ranked: np.ndarray, held_out: int) -> Split:
    """Without boxes: any picture gives any number of random boxes of every class."""
    count = min(held_out, _most_held_out(len(ranked)))
    return Split(ranked[:count], ranked[:count], held_out, [ranked[count:]] * len(SIZE_CLASSES))


def split_boxes(
    ranked: np.ndarray, pictures: np.ndarray, classes: np.ndarray, weights: np.ndarray, held_out: int
) -> Split:
    """Pictures from the front of `ranked` until they give `held_out` boxes of the wanted mix, a fifth of them
    at most.

    pictures, classes: of each box of the table, [n]; weights [3], of the size classes. Boxes of classes
    without weight and of pictures that are not in `ranked` are on neither side.
    """
    rank = np.full(int(pictures.max()) + 1, len(ranked))
    rank[ranked] = np.arange(len(ranked))
    eligible = np.flatnonzero((weights[classes] > 0) & (rank[pictures] < len(ranked)))
    eligible = eligible[np.argsort(rank[pictures[eligible]], kind="stable")]
    ranks, kinds = rank[pictures[eligible]], classes[eligible]
    quota = _shares(weights * (np.bincount(kinds, minlength=len(weights)) > 0), held_out)
    count = _pictures_to_hold_out(ranks, kinds, quota, len(ranked))
    held = ranks < count
    chosen = _pick(eligible[held], kinds[held], quota)
    pools = [np.sort(eligible[~held & (kinds == index)]) for index in range(len(weights))]
    return Split(ranked[:count], chosen, len(chosen), pools)


def _pictures_to_hold_out(ranks: np.ndarray, classes: np.ndarray, quota: np.ndarray, pictures: int) -> int:
    """How many of the first pictures give the quota [3] of boxes, at most a fifth of them and at least one; 0
    if none are wanted.

    ranks and classes are the picture's rank and the size class of each box [n]. A class too rare to fill its
    quota asks for a fifth of its boxes.
    """
    if not quota.any():
        return 0
    given = (
        np.bincount(ranks * len(quota) + classes, minlength=pictures * len(quota))
        .reshape(pictures, -1)
        .cumsum(axis=0)
    )
    wanted = np.minimum(quota, np.floor(_HELD_OUT_PART * given[-1]))
    enough = (given >= wanted).all(axis=1) & (given.sum(axis=1) >= quota.sum())
    first = int(enough.argmax()) + 1 if enough.any() else pictures
    return min(first, _most_held_out(pictures))


def _most_held_out(pictures: int) -> int:
    return max(1, int(_HELD_OUT_PART * pictures))


def _shares(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers [k] that add up to `total`, in proportion to `weights` [k]; the largest remainders are
    rounded up."""
    exact = weights / weights.sum() * total
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    return shares


def _pick(boxes: np.ndarray, classes: np.ndarray, quota: np.ndarray) -> np.ndarray:
    """Of `boxes` [n] the first quota[c] of each class c, short classes made up from the others while there
    are any; in their order."""
    place = np.zeros(len(boxes), np.int64)  # how many of its own class come before each box
    for index in range(len(quota)):
        mine = classes == index
        place[mine] = np.arange(mine.sum())
    over = place >= quota[classes]
    chosen = np.argsort(over, kind="stable")[: quota.sum()]
    return boxes[np.sort(chosen)]
