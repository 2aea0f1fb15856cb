"""Sampling a token from logits, in plain PyTorch. A row's draw depends on (seed, row, position) alone, never
on the rows beside it.

The draw inverts the distribution function: one uniform number a row, and the first token, in the order of the
ids, at which the running sum of the kept tokens' probabilities passes that number's share of their total. R
rows, V vocabulary ids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The SplitMix64 finaliser and its increment (Steele, Lea and Flood, "Fast splittable pseudorandom number
# generators", 2014)
GOLDEN, MIX_A, MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Place(NamedTuple):
    """Where in the streams of random numbers each row draws."""

    seed: int  # any 64 bits, as int64
    row: Tensor  # int64 [R]
    position: Tensor | int  # int64 [R], [1] or []


class Distribution(NamedTuple):
    """What is drawn from, see `op.sample`."""

    temperature: float
    top_p: float
    top_k: int
    allowed: Tensor | None  # bool [V]


# --------------------------------------------------------------------------------------------- random numbers
def wrap(value: int) -> int:
    """An unsigned 64-bit number as int64, modulo 2**64."""
    return (value + 2**63) % 2**64 - 2**63


def stream(seed: int) -> int:
    """The state, as int64, from which every draw of a seed starts: mixed, so that the streams of two seeds
    are no shifted copies of each other."""
    z = (seed + GOLDEN) % 2**64
    z = (z ^ z >> 30) * MIX_A % 2**64
    z = (z ^ z >> 27) * MIX_B % 2**64
    return wrap(z ^ z >> 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * wrap(MIX_A)
    z = (z ^ _shift(z, 27)) * wrap(MIX_B)
    return z ^ _shift(z, 31)


def uniform(place: Place) -> Tensor:
    """float64 [R] in [0, 1), a hash of (seed, row, position)."""
    seed, row, position = place
    state = torch.full_like(row, stream(seed))
    for word in (row, position + torch.zeros_like(row)):
        state = _mix(state + word + wrap(GOLDEN))
    return _shift(state, 11).double() * 2.0**-53


# ---------------------------------------------------------------------------------------------------- drawing
def keep(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which of the scaled logits [R, V] top-k, and then top-p among what is left, keep: bool [R, V]. Tokens
    as probable as the last kept are kept."""
    kept = scores > -torch.inf
    if 0 < top_k < scores.shape[1]:
        kept = kept & (scores >= scores.topk(top_k, -1).values[:, -1:])
    if top_p < 1:
        probability = scores.double().masked_fill(~kept, -torch.inf).softmax(-1)
        sorted_RV = probability.sort(dim=-1, descending=True).values
        within = (sorted_RV.cumsum(-1) - sorted_RV < top_p) & (sorted_RV > 0)
        last = within.sum(-1, keepdim=True) - 1
        kept = kept & (probability >= sorted_RV.gather(-1, last.clamp(min=0)))
    return kept


def invert(mass: Tensor, u: Tensor) -> Tensor:
    """The first id, int64 [R], at which the running sum of mass, float64 [R, V], exceeds u of its total; u
    float64 [R] in [0, 1)."""
    cumulative = mass.cumsum(-1)
    target = u[:, None] * cumulative[:, -1:]
    # rounding must not step past the last token with mass
    last = (mass > 0).long().cumsum(-1).argmax(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last)[:, 0]


def sample(logits: Tensor, place: Place, distribution: Distribution) -> tuple[Tensor, Tensor]:
    """What `op.sample` documents."""
    temperature, top_p, top_k, allowed = distribution
    scores = logits.float() * (1 / temperature) if temperature > 0 else logits.float()
    open_RV = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
    if temperature == 0:
        ids = open_RV.argmax(-1)
    else:
        kept = keep(open_RV, top_k, top_p)
        ids = invert(open_RV.double().masked_fill(~kept, -torch.inf).softmax(-1), uniform(place))
    return ids, scores.gather(-1, ids[:, None])[:, 0] - scores.logsumexp(-1)
