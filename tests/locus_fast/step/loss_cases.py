"""Objectives with every bound off but those asked for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from locus_fast.step.losses import Objective

OFF = {
    "clip_low": 0.2,
    "clip_high": 0.3,
    "delta": math.inf,
    "kl_coef": 0.0,
    "entropy_coef": 0.0,
    "log_ratio_clamp": math.inf,
    "kl_clamp": math.inf,
}


def objective(loss: str, kl_estimator: str = "k3", **numbers: float) -> Objective:
    """A loss with the bounds above, and all else off unless it is given."""
    return Objective(loss=loss, kl_estimator=kl_estimator, **{**OFF, **numbers})


def double(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)
