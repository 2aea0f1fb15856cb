"""The records that the head's functions take in place of long lists of arguments. Legend: T tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scale(NamedTuple):
    """From raw logits to y: soft-cap first, then temperature."""

    temperature: float
    softcap: float | None

    @staticmethod
    def of(temperature: float, softcap: float | None) -> Scale:
        """Of any numbers."""
        return Scale(float(temperature), None if softcap is None else float(softcap))


class Saved(NamedTuple):
    """What the forward pass leaves for the backward one."""

    lse: Tensor  # float64 [T]: log-sum-exp of y
    entropy: Tensor  # [T] in nats, float32 (float64 for float64 inputs)


class Slope(NamedTuple):
    """Gradients of the loss to the two results."""

    logprob: Tensor  # [T]
    entropy: Tensor | None  # [T]; None: the loss does not depend on the entropy


class Wanted(NamedTuple):
    """Which gradients the backward pass is to compute."""

    hidden: bool
    weight: bool
