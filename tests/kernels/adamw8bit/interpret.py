"""Cases of the 8-bit AdamW kernel; test_adamw8bit.py runs them under the interpreter and on the GPU."""

from __future__ import annotations

import pytest
import torch
from locus_kernels.adamw8bit import new_state, reference
from locus_kernels.adamw8bit import triton as kernels
from locus_kernels.adamw8bit.reference import Scalars, Settings
from torch import Tensor

from tests.kernels.interpreter import device, poisoned_empty

DEVICE = device()
SHAPES = [(32, 128), (33,), (0, 7), (3, 1367), (5, 1024), (4097,)]
SETTINGS = Settings(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_empty(monkeypatch)


def some(shape: tuple[int, ...], rng: torch.Generator, spread: float, dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=rng) * torch.randn(shape, generator=rng).mul(spread).exp()
    return values.to(dtype).to(DEVICE)


def steps(
    dtype: torch.dtype, slopes: torch.dtype, rows: int, spread: float, sides: tuple
) -> list[tuple[list, list]]:
    """(weights, states) after three steps by each of two functions, from the same start."""
    ends = []
    for side in sides:
        rng = torch.Generator().manual_seed(9)
        weights = [some(shape, rng, 0.0, dtype) for shape in SHAPES]
        states = [new_state(weight) for weight in weights]
        rates = [torch.tensor(rate, device=DEVICE) for rate in [1e-2, 1e-3, 1e-4] * 2]
        for count in (1, 2, 3):
            corrections = [[1 - 0.9**count, 1 - 0.999**count]] * len(SHAPES)
            scale = torch.tensor(0.0 if count == 2 else 0.3, device=DEVICE)
            scalars = Scalars(rates, scale, torch.tensor(corrections, device=DEVICE))
            words = [reference.key(count, number) for number in range(len(SHAPES))]
            gradients = [some(shape, rng, spread, slopes) for shape in SHAPES]
            if count == 2:
                gradients[0][3] = float("nan")  # a scale of 0 hides it
            extra = {"rows": rows} if side is kernels.adamw8bit_ else {}
            side(weights, gradients, states, scalars, SETTINGS, words, **extra)
        ends.append((weights, states))
    return ends


@pytest.mark.parametrize("spread", [0.0, 2.0])
@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize(
    ("dtype", "slopes"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_the_kernel_steps_as_the_reference(
    dtype: torch.dtype, slopes: torch.dtype, rows: int, spread: float
) -> None:
    """Weights to a few roundings; codes equal but where a value lies on the border of two, which moves a
    later step of that weight by a hundredth of the rate or so."""
    (ours, states), (theirs, expected) = steps(
        dtype, slopes, rows, spread, (kernels.adamw8bit_, reference.adamw8bit_)
    )
    for weight, other, state, truth in zip(ours, theirs, states, expected, strict=True):
        assert weight.isfinite().all()
        if dtype == torch.float32:
            close = torch.isclose(weight, other, rtol=1e-5, atol=1e-7)
            assert (~close).float().sum() <= 0.001 * weight.numel()
            torch.testing.assert_close(weight, other, rtol=1e-5, atol=0.1 * 1e-2)
        else:
            assert (weight != other).float().sum() <= 0.002 * weight.numel()
        for name, value in state.items():
            if name.endswith("codes"):
                assert (value != truth[name]).float().sum() <= 0.002 * value.numel() + 1
                assert ((value.int() - truth[name].int()).abs() <= 12).all()
            else:
                torch.testing.assert_close(value, truth[name], rtol=2e-4, atol=1e-12)


def test_equal_bits_every_time() -> None:
    (ours, states), (again, others) = steps(torch.bfloat16, torch.bfloat16, 4, 1.0, (kernels.adamw8bit_,) * 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    for state, other in zip(states, others, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in state.items())


def test_a_strided_gradient_and_a_view_as_weight() -> None:
    rng = torch.Generator().manual_seed(1)
    storage = torch.zeros(64 * 64 * 3 + 5, device=DEVICE)
    # not aligned to 16 bytes
    weights = [
        storage[5 : 5 + 4096].view(64, 64),
        storage[5 + 4096 : 5 + 8192].view(64, 64),
    ]
    gradients = [
        some((64, 64), rng, 1.0, torch.float32).t(),
        some((64, 128), rng, 1.0, torch.float32)[:, ::2],
    ]
    ends = []
    for side in (kernels.adamw8bit_, reference.adamw8bit_):
        storage.zero_()
        states = [new_state(weight) for weight in weights]
        rates, corrections = [torch.tensor(1e-2, device=DEVICE)] * 2, torch.tensor([[0.1, 0.001]] * 2)
        scalars = Scalars(rates, torch.ones((), device=DEVICE), corrections.to(DEVICE))
        words = [reference.key(0, 0), reference.key(0, 1)]
        side(weights, gradients, states, scalars, SETTINGS, words)
        ends.append(storage.clone())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-8)
    assert ends[0][:5].eq(0).all()
    assert ends[0][5 + 8192 :].eq(0).all()
