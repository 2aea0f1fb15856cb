"""What the four numbers of a box mean: `--box-format`, and how a file shows that they mean something else.

A box of small numbers is a box in any format, so single boxes prove nothing and nothing is guessed. The file
as a whole is refused where its format's standard reading cannot be: (a) most boxes lie within the first pixel
(shares of 1); (b) a third of the boxes cannot be boxes of their images, and another reading leaves at most a
tenth of those; (c) the boxes fill 0..1000 in both axes and stop there, whatever their images' sizes. What is
odd without being proof becomes a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from locus_fast.errors import UserError

MEANING = {
    "xyxy": "x1, y1, x2, y2 in pixels",
    "xywh": "x, y, width, height in pixels",
    "normalized": "x1, y1, x2, y2 from 0 to 1",
    "thousand": "x1, y1, x2, y2 from 0 to 1000",
}
_UNITS = {"normalized": 1.0, "thousand": 1000.0}  # what the image's far edge is

_FAR_OUT = (2.0, 0.02)  # px and parts of the image's side that a box may stick out by: rounding, hasty labels
_MOST_WRONG = 1 / 3  # of the boxes: from here on another reading is looked for
_FEW_WRONG = (
    0.05  # the same where the boxes fill 0..1000 (c): images of nearly 1000 px hide most of what is wrong
)
_LEFT_WRONG = 0.1  # of those boxes: as many may be wrong in the other reading
# (c): largest far edges, deviation of the centres, and boxes, at least
_FILLED, _SPREAD, _ENOUGH = (
    900.0,
    150.0,
    20,
)
_NEARLY_ALL = 0.98  # (c): part of the boxes that end by 1000
_LARGER = 1250  # px: images whose pixels go on well past 1000
_BY_CHANCE = 0.01


@dataclass(frozen=True)
class Evidence:
    """n boxes as their file has them, on images of known size."""

    raw: np.ndarray  # float64 [n, 4]
    sides: np.ndarray  # float64 [n, 2], the image's width and height
    first: Callable[[np.ndarray], str]  # names the first of the chosen boxes, bool [n]

    def faults(self, xyxy: np.ndarray) -> dict[str, np.ndarray]:
        """Why boxes cannot be boxes of their images, each bool [n]; rounding and hasty labels are let
        pass."""
        room = _FAR_OUT[0] + _FAR_OUT[1] * self.sides
        return {
            "reversed": (xyxy[:, 2:] < xyxy[:, :2]).any(axis=1),
            "of zero area": (xyxy[:, 2:] == xyxy[:, :2]).any(axis=1),
            "sticking out of their image": ((xyxy[:, :2] < -room) | (xyxy[:, 2:] > self.sides + room)).any(
                axis=1
            ),
        }

    def wrong_as(self, name: str) -> np.ndarray:
        """bool [n]: cannot be a box of its image in this format."""
        return np.logical_or.reduce(list(self.faults(to_xyxy(self.raw, self.sides, name)).values()))

    def wrong_as_widths(self, unit: float) -> np.ndarray:
        """The same for x, y, width, height in shares of `unit`, which no format reads."""
        pixels = to_xyxy(self.raw * np.tile(self.sides, 2) / unit, self.sides, "xywh")
        return np.logical_or.reduce(list(self.faults(pixels).values()))

    def wrongs_text(self, name: str) -> str:
        """What is wrong in this format, counted by reason, each with its first culprit."""
        faults = self.faults(to_xyxy(self.raw, self.sides, name))
        return ", ".join(
            f"{int(bad.sum()):,} {reason} (first: {self.first(bad)})"
            for reason, bad in faults.items()
            if bad.any()
        )

    def ends_at_thousand(self, name: str) -> bool:
        """Whether nearly all lie in 0..1000 as corners (xyxy) or with widths (xywh), spread in both axes and
        up to nearly 1000: that is where shares of 1000 end, and not where pixels do."""
        corners = to_xyxy(self.raw, self.sides, name)
        inside = corners[(corners <= 1000).all(axis=1)]
        centres, far = (inside[:, :2] + inside[:, 2:]) / 2, inside[:, 2:]
        return bool(
            len(inside) >= max(_ENOUGH, _NEARLY_ALL * len(corners))
            and (far > inside[:, :2]).all(axis=1).mean() >= _NEARLY_ALL
            and (far.max(axis=0) >= _FILLED).all()
            and (centres.std(axis=0) >= _SPREAD).all()
        )

    def starts_in_thousand(self, name: str) -> bool:
        """Whether all lie in 0..1000 where boxes spread evenly over their images would hardly ever do."""
        corners = to_xyxy(self.raw, self.sides, name)
        chance = np.log(np.minimum(1.0, 1000 / self.sides)).sum()
        return bool(
            (corners <= 1000).all()
            and (corners[:, 2:] > corners[:, :2]).all()
            and chance < math.log(_BY_CHANCE)
        )


def to_xyxy(raw: np.ndarray, sides: np.ndarray, name: str) -> np.ndarray:
    """Boxes [n, 4] of the format `name` as xyxy in pixels, float64; sides [n, 2] are their images' width and
    height."""
    if name == "xywh":
        return np.concatenate((raw[:, :2], raw[:, :2] + raw[:, 2:]), axis=1)
    if name == "xyxy":
        return raw
    return raw * np.tile(sides, 2) / _UNITS[name]


def check_standard(
    raw: np.ndarray, sides: np.ndarray, standard: str, where: str, first: Callable[[np.ndarray], str]
) -> str:
    """Raise UserError, naming the options that fit, if the file's boxes cannot be what its kind of file
    usually holds.

    raw: float64 [n, 4], the numbers as they stand; sides: float64 [n, 2], 0 where unknown; where: the file,
    for messages; first: names the first of the chosen boxes (bool [n]). Returns a note on what is odd without
    being proof, else "".
    """
    known = np.isfinite(raw).all(axis=1) & (sides > 0).all(axis=1)
    if not known.any():
        return ""
    evidence = Evidence(raw[known], sides[known], lambda chosen: first(np.flatnonzero(known)[chosen]))
    _refuse_shares_of_one(evidence, where)
    ending = [name for name in ("xyxy", "xywh") if evidence.ends_at_thousand(name)]
    if _is_much(evidence.wrong_as(standard), bool(ending)):
        _refuse_misread(evidence, standard, where)
    large = int((evidence.sides >= _LARGER).all(axis=1).sum())
    if ending and large >= _ENOUGH:
        advice = _give(["thousand"], standard) if "xyxy" in ending else _convert("thousand", standard)
        what = "its boxes fill 0 to 1000 in both axes and end there"
        raise UserError(f"{where}: {what}, {large:,} of them on images beyond {_LARGER:,} pixels: {advice}")
    if evidence.starts_in_thousand("xyxy") or evidence.starts_in_thousand(standard):
        where_to = f"if they are {MEANING['thousand']}, give --box-format thousand"
        return f"all boxes lie within the first 1000 pixels: {where_to}"
    return ""


def _is_much(wrong: np.ndarray, ending: bool) -> bool:
    """Whether so many boxes are wrong that it is their reading, and not a slip here and there."""
    count = int(wrong.sum())
    return count == len(wrong) or (
        count >= 2 and count >= (_FEW_WRONG if ending else _MOST_WRONG) * len(wrong)
    )


def _refuse_shares_of_one(evidence: Evidence, where: str) -> None:
    shares = (np.abs(evidence.raw) <= 1.01).all(axis=1)
    if shares.mean() <= 0.5:
        return
    lie = "lie within the first pixel of their image, so they are shares of 1"
    what = f"{int(shares.sum()):,} of its {len(shares):,} boxes {lie}"
    if (evidence.raw[shares, 2:] > evidence.raw[shares, :2]).all(axis=1).mean() >= 1 - _LEFT_WRONG:
        raise UserError(f"{where}: {what}: give --box-format normalized, which reads {MEANING['normalized']}")
    raise UserError(f"{where}: {what}, but no corners: {_convert('normalized')}")


def _refuse_misread(evidence: Evidence, standard: str, where: str) -> None:
    """Raise UserError if another reading explains nearly all that is wrong in the standard one."""
    wrong = int(evidence.wrong_as(standard).sum())
    others = {
        name: int(evidence.wrong_as(name).sum()) for name in ("xyxy", "xywh", "thousand") if name != standard
    }
    fits = [
        name
        for name, count in others.items()
        if count <= _LEFT_WRONG * wrong and count == min(others.values())
    ]
    count = len(evidence.raw)
    if len(fits) > 1 and count >= _ENOUGH and evidence.raw.max() < _FILLED:
        # so many shares of 1000 would come nearer to 1000
        fits = [name for name in fits if name != "thousand"]
    cannot = f"cannot be {MEANING[standard]} of their images: {evidence.wrongs_text(standard)}"
    what = f"{wrong:,} of its {count:,} boxes {cannot}"
    if fits:
        raise UserError(f"{where}: {what}; {_give(fits, standard)}")
    if count >= _ENOUGH and int(evidence.wrong_as_widths(1000.0).sum()) <= _LEFT_WRONG * wrong:
        advice = _convert("thousand", standard)
        raise UserError(f"{where}: {what}; as x, y, width, height from 0 to 1000 they fit: {advice}")


def _give(fits: list[str], standard: str) -> str:
    """What to do about a misread file: the options that read it, and the one that insists on the standard."""
    options = " or ".join(f"--box-format {name} if they are {MEANING[name]}" for name in fits)
    return f"give {options}, and --box-format {standard} to read them as {MEANING[standard]} all the same"


def _convert(name: str, standard: str = "") -> str:
    """The same where no option reads it."""
    insist = (
        f", or give --box-format {standard} to read them as {MEANING[standard]} all the same"
        if standard
        else ""
    )
    return f"write them as {MEANING[name]} and give --box-format {name}{insist}"
