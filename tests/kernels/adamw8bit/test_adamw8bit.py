"""8-bit AdamW held to float32 AdamW, torch's own. The kernel's cases are in interpret.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from locus_kernels.adamw8bit import adamw8bit_, dequantize, new_state
from torch import Tensor

from tests.kernels.interpreter import WAYS, run_cases

STEPS = 200
SHAPE = (16, 256)


@pytest.mark.parametrize("interpret", WAYS)
def test_kernels(interpret: bool, subtests: pytest.Subtests) -> None:
    run_cases("adamw8bit/interpret.py", interpret, subtests=subtests)


# --------------------------------------------------------------------------------------- beside float32 AdamW
def noise(base: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
    """No mean: moments change sign all the time."""
    while True:
        yield base * torch.randn(SHAPE, generator=rng)


def drift(base: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
    """A mean as large as the noise around it."""
    sign = torch.randn(SHAPE, generator=rng).sign()
    while True:
        yield base * (sign + torch.randn(SHAPE, generator=rng))


def turns(base: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
    """The same gradient, and its opposite every 20 steps."""
    sign = torch.randn(SHAPE, generator=rng).sign()
    while True:
        yield from (base * sign for _ in range(20))
        sign = -sign


def sparse(base: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
    """99% zeros for 50 steps, then none."""
    for step in range(STEPS):
        gradient = base * torch.randn(SHAPE, generator=rng)
        yield gradient * (torch.rand(SHAPE, generator=rng) < 0.01) if step < 50 else gradient


def fading(base: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
    """Half of each block's gradients all but vanish after 40 steps."""
    half = torch.arange(SHAPE[1]) % 2 == 0
    for step in range(STEPS):
        gradient = base * torch.randn(SHAPE, generator=rng)
        yield torch.where(half | (step < 40), gradient, 1e-3 * gradient)


def both(kind: Callable, spread: float, scale: float, seed: int = 0) -> tuple[Tensor, Tensor, float, float]:
    """(weights of 8-bit AdamW after STEPS steps at a rate of 1 from 0, those of torch's AdamW, largest step
    of each).

    Gradients of an element are of one size, lognormal with this spread within a block.
    """
    rng = torch.Generator().manual_seed(seed)
    base = torch.randn(SHAPE, generator=rng).mul(spread).exp() * scale
    ours, theirs = torch.zeros(SHAPE), torch.nn.Parameter(torch.zeros(SHAPE))
    state, peer = new_state(ours), torch.optim.AdamW([theirs], lr=1.0, weight_decay=0.0)
    largest = [0.0, 0.0]
    for step, gradient in zip(range(STEPS), kind(base, rng), strict=False):
        before = ours.clone(), theirs.detach().clone()
        one = torch.ones(())
        adamw8bit_([ours], [gradient], [state], lr=[one], gradient_scale=one, seed=step, streams=[0])
        theirs.grad = gradient.clone()
        peer.step()
        for i, (now, then) in enumerate(zip((ours, theirs.detach()), before, strict=True)):
            largest[i] = max(largest[i], (now - then).abs().max().item())
    return ours, theirs.detach(), *largest


@pytest.mark.long
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-8])
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("kind", [noise, drift, turns, sparse, fading])
def test_no_step_leaps_and_the_way_is_that_of_float32(kind: Callable, spread: float, scale: float) -> None:
    ours, theirs, largest, peers_largest = both(kind, spread, scale)
    assert peers_largest < 2
    assert largest < 2
    distance = ((ours - theirs).norm() / theirs.norm()).item()
    assert distance < {0.0: 0.05, 0.5: 0.05, 1.0: 0.10}.get(spread, 0.20)


@pytest.mark.parametrize("kind", [drift, turns])
def test_steps_are_symmetric_in_sign(kind: Callable) -> None:
    def mirrored(base: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
        return (-gradient for gradient in kind(base, rng))

    assert torch.equal(both(kind, 1.0, 1e-4)[0], -both(mirrored, 1.0, 1e-4)[0])


def test_constant_gradients_of_either_sign_move_weights_alike() -> None:
    """400 steps of +1 and of -1 in one block: both go 400 rates, as in float32."""
    ours = torch.zeros(SHAPE)
    state, one = new_state(ours), torch.ones(())
    gradient = torch.where(torch.arange(SHAPE[1]) % 2 == 0, 1.0, -1.0).expand(SHAPE)
    for step in range(400):
        adamw8bit_([ours], [gradient], [state], lr=[one], gradient_scale=one, seed=step, streams=[0])
    torch.testing.assert_close(ours, -400 * gradient, rtol=1e-3, atol=0)


@pytest.mark.long
def test_a_second_moment_follows_gradients_that_shrink() -> None:
    """4,000 steps, the last 3,500 with half of the gradients a thousandth: on average each second moment is
    float32's.

    Rounded to nearest it would stand still between two codes, three times too large.
    """
    rng = torch.Generator().manual_seed(0)
    weight, second = torch.zeros(16, 256), torch.zeros(16, 256)
    state, one = new_state(weight), torch.ones(())
    shrink = torch.where(torch.arange(256) % 2 == 0, 1.0, 1e-3)
    for step in range(4000):
        gradient = torch.randn(16, 256, generator=rng) * (shrink if step >= 500 else 1.0)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        adamw8bit_([weight], [gradient], [state], lr=[one], gradient_scale=one, seed=step, streams=[0])
    ratio = (dequantize(state)[1] / second).sqrt()
    for half in (ratio[:, ::2], ratio[:, 1::2]):
        assert half.mean().item() == pytest.approx(1, abs=0.02)
        assert half.std() < 0.25


def test_a_weight_whose_gradients_stop_stops() -> None:
    """Half of each block's gradients are 0 after 50 steps. In float32 the way that is left from step 150 on
    is under 0.9**100 of a rate a step; a first moment rounded to nearest would go on at one pace, in one
    direction, for ever."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.zeros(SHAPE)
    state, one = new_state(weight), torch.ones(())
    stopped = torch.arange(SHAPE[1]) % 2 == 0
    for step in range(1000):
        if step == 150:
            then = weight.clone()
        gradient = torch.randn(SHAPE, generator=rng).masked_fill(stopped & (step >= 50), 0)
        adamw8bit_([weight], [gradient], [state], lr=[one], gradient_scale=one, seed=step, streams=[0])
    assert (weight - then).abs()[:, stopped].max() < 0.5
    assert (weight - then).abs()[:, ~stopped].mean() > 5


# ----------------------------------------------------------------------------------------------------- inputs
def arguments() -> dict:
    weight = torch.zeros(64, 64)
    given = {"parameters": [weight], "gradients": [weight.clone()], "states": [new_state(weight)], "seed": 0}
    return given | {"lr": [torch.tensor(1e-3)], "gradient_scale": torch.ones(()), "streams": [0]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gradients": []}, "a gradient, a state, a rate and a stream for each parameter"),
        (
            {"parameters": [torch.zeros(64, 64, dtype=torch.float16)]},
            "parameter: expected float32 or bfloat16, got torch.float16",
        ),
        (
            {"gradients": [torch.zeros(64, 64, dtype=torch.int32)]},
            "gradient: expected float32 or bfloat16, got torch.int32",
        ),
        ({"gradients": [torch.zeros(64, 32)]}, "gradients of their parameters' shapes"),
        ({"parameters": [torch.zeros(64, 64).t()[:, :]]}, "contiguous parameters"),
        ({"lr": [torch.tensor([1e-3])]}, r"lr: expected float32 \[\], got torch.float32 \[1\]"),
        ({"gradient_scale": torch.ones((), dtype=torch.float64)}, "gradient_scale: expected float32"),
        ({"states": [new_state(torch.zeros(64, 128))]}, r"the state of a parameter of shape \[64, 64\]"),
        ({"states": [{}]}, r"the state of a parameter of shape \[64, 64\]"),
        ({"gradients": [torch.zeros(64, 64, device="meta")]}, "every tensor on cpu"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        adamw8bit_(**arguments() | change)


def test_a_scale_of_0_counts_every_gradient_as_0() -> None:
    given = arguments()
    given["gradients"][0].fill_(math.nan)
    adamw8bit_(**given | {"gradient_scale": torch.zeros(())})
    assert given["parameters"][0].eq(0).all()
    assert all(value.isfinite().all() for value in given["states"][0].values())


def test_nothing_to_step_is_no_error() -> None:
    adamw8bit_([], [], [], lr=[], gradient_scale=torch.ones(()), seed=0, streams=[])
    empty = torch.zeros(0, 5)
    given = arguments() | {"parameters": [empty], "gradients": [empty], "states": [new_state(empty)]}
    adamw8bit_(**given)
