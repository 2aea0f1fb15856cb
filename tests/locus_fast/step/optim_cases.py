"""Weights, gradients and every optimizer."""

from __future__ import annotations

import math

import pytest
import torch

from locus_fast.step.optimizers import make_optimizer

STEP = {"denominator": 1, "factor": 1.0, "clip": math.inf, "seed": 0}
NEEDS = {"bnb-adamw8bit": "bitsandbytes", "bnb-paged-adamw8bit": "bitsandbytes"}
ON_DEVICE = [
    ("adamw", torch.float32),
    ("adamw-master", torch.bfloat16),
    ("adamw8bit", torch.bfloat16),
    ("adamw8bit", torch.float32),
]
ALL = [*ON_DEVICE, ("bnb-adamw8bit", torch.float32), ("bnb-paged-adamw8bit", torch.float32)]


def made(
    name: str, weights: list[torch.Tensor], rate: float = 1e-3, weight_decay: float = 0.01
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Parameters with these values, in a group each, and their optimizer."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    return parameters, make_optimizer(name, [{"params": [p], "rate": rate} for p in parameters], weight_decay)


def weights(dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> list[torch.Tensor]:
    """A tensor in 8-bit blocks, one too small for them, one that they do not divide."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng).to(device, dtype) for shape in ((64, 128), (33,), (3, 1367))]


def give(parameters: list[torch.nn.Parameter], seed: int) -> None:
    for p, gradient in zip(
        parameters, weights(parameters[0].dtype, 1000 + seed, str(parameters[0].device)), strict=True
    ):
        p.grad = gradient
