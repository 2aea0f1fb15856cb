"""8-bit AdamW: launches, and what else is asked of the device. Nothing is computed."""

from __future__ import annotations

import pytest
import torch
from locus_kernels.adamw8bit import new_state
from locus_kernels.adamw8bit.reference import Scalars, Settings

from tests.kernels.probes import WAITING, Operations


def test_any_number_of_parameters_is_two_launches(launches: list[str]) -> None:
    """One for those in blocks, and one for those that are not."""
    kernels = pytest.importorskip("locus_kernels.adamw8bit.triton")
    weights = [torch.zeros(shape, dtype=torch.bfloat16) for shape in ((64, 128), (33,), (16, 256)) * 40]
    states = [new_state(weight) for weight in weights]
    scalars = Scalars([torch.tensor(1e-3)] * 120, torch.ones(()), torch.ones(120, 2))
    with Operations() as operations:
        kernels.adamw8bit_(
            weights, weights, states, scalars, Settings(0.9, 0.999, 1e-8, 0.01), [(1, 2)] * 120
        )
    assert launches == ["adamw8bit_kernel"] * 2
    assert not set(operations.names) & set(WAITING)
