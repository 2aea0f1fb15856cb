"""Sampling a token from logits, in plain PyTorch. A row's draw depends on (seed, row, position) alone, never on the rows beside it."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, *, seed: int, row: Tensor, position: int, temperature: float, top_p: float, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability.

    logits [R, V]; row int64 [R], the identity of each row in this seed; allowed bool [V], the ids that may be drawn; temperature 0 is greedy.
    Returns (ids int64 [R], log-prob float32 [R]). The log-probability is the full softmax's at this temperature (at 1 for greedy), before top_p and
    `allowed` cut it, which is what the training forward computes for the same token.
    """
    logits = logits.float()
    logprob_RV = (logits / temperature if temperature > 0 else logits).log_softmax(-1)
    open_RV = logprob_RV.masked_fill(~allowed, -torch.inf)
    ids = open_RV.argmax(-1) if temperature == 0 else draw(open_RV.double().softmax(-1), uniform(seed, row, position), top_p)
    return ids, logprob_RV.gather(-1, ids[:, None])[:, 0]


def draw(probability: Tensor, u: Tensor, top_p: float) -> Tensor:
    """Inverse-CDF draw from the smallest set of most probable tokens that holds `top_p`. probability float64 [R, V], u float64 [R] in [0, 1)."""
    if top_p < 1:
        sorted_RV, order_RV = probability.sort(dim=-1, descending=True, stable=True)
        sorted_RV = sorted_RV * (sorted_RV.cumsum(-1) - sorted_RV < top_p)
        return order_RV.gather(-1, _invert(sorted_RV, u))[:, 0]
    return _invert(probability, u)[:, 0]


def _invert(mass: Tensor, u: Tensor) -> Tensor:
    cumulative = mass.cumsum(-1)
    target = u[:, None] * cumulative[:, -1:]
    last = (mass > 0).long().cumsum(-1).argmax(-1, keepdim=True)  # rounding must not step past the last token with mass
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last)


def uniform(seed: int, row: Tensor, position: int) -> Tensor:
    """float64 in [0, 1) from the SplitMix64 finaliser (Steele, Lea and Flood 2014) of (seed, row, position); row int64 [R]."""
    state = torch.full_like(row, seed)
    for word in (row, torch.full_like(row, position)):  # mixed before each word, so that streams of other seeds are no shifted copies
        state = _mix(state + _wrap(0x9E3779B97F4A7C15)) + word
    state = _mix(state + _wrap(0x9E3779B97F4A7C15))
    return _shift(state, 11).double() * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _wrap(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _wrap(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    """An unsigned 64-bit constant as int64."""
    return (value + 2**63) % 2**64 - 2**63
