"""Inputs and truth for the tests of the head's kernels. Legend: T tokens, V vocabulary, D hidden size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from locus_kernels.linear_logprob.records import Saved
from locus_kernels.linear_logprob.reference import dense
from torch import Tensor

# (T, D, V)
SHAPES = [
    (0, 5, 7),
    (1, 1, 7),
    (3, 16, 31),
    (37, 40, 523),
    (130, 24, 257),
    (2, 0, 11),
    (5, 8, 1),
]


FULL = 2048, 2048, 151_936  # T, D, V of a real step


def head_inputs(
    T: int, D: int, V: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, D] and weight [V, D], both views of wider storage and so not contiguous, and ids [T] with
    both ends of the vocabulary."""
    generator = torch.Generator().manual_seed(seed + T + 1000 * D + 7 * V)
    hidden = torch.randn(T, D + 8, generator=generator)[:, :D]
    weight = torch.randn(V, D + 8, generator=generator)[:, :D] * 1.5 / max(D, 1) ** 0.5
    ids = torch.randint(0, V, (T,), generator=generator)
    ids[:1], ids[1:2] = 0, V - 1
    return _strided(hidden, dtype, device), _strided(weight, dtype, device), ids.to(device)


def _strided(matrix: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    wide = torch.zeros(matrix.shape[0], matrix.shape[1] + 8, dtype=dtype, device=device)
    wide[:, : matrix.shape[1]] = matrix.to(dtype)
    return wide[:, : matrix.shape[1]]


def full_size() -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Saved]:
    """((hidden, weight, ids), a vector [T], what the forward pass leaves) of `FULL`, without values."""
    T, D, V = FULL
    hidden, weight = (torch.empty(n, D, device="meta", dtype=torch.bfloat16) for n in (T, V))
    vector = torch.empty(T, device="meta")
    ids = torch.empty(T, dtype=torch.int64, device="meta")
    return (hidden, weight, ids), vector, Saved(vector.double(), vector)


def loss_gradients(function, hidden: Tensor, weight: Tensor, ids: Tensor, *options) -> list[Tensor]:
    """[log-prob, entropy, d/d hidden, d/d weight] in float64, for a fixed mix of both outputs; every third
    row has no gradient at all."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logprob, entropy = function(hidden, weight, ids, *options)
    mix = torch.linspace(-1, 1, len(ids), dtype=logprob.dtype, device=ids.device) * (
        torch.arange(len(ids), device=ids.device) % 3 != 0
    )
    ((mix * logprob).sum() + (0.5 * mix * entropy).sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [t.detach().double() for t in (logprob, entropy, hidden.grad, weight.grad)]


def assert_as_good_as_eager(
    function,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    *options,
    draws: int = 6,
    slack: float = 1e-6,
) -> None:
    """`function` against `dense` on `shape`; see `assert_errors`."""

    def draw(seed: int) -> list[list[Tensor]]:
        inputs = head_inputs(*shape, dtype, device, seed)
        truth = loss_gradients(dense, inputs[0].double(), inputs[1].double(), inputs[2], *options)
        return [loss_gradients(function, *inputs, *options), loss_gradients(dense, *inputs, *options), truth]

    assert_errors(draw, draws if shape[0] * shape[1] < 1000 else 1, slack)


def recomputed(shape: tuple[int, int, int], dtype: torch.dtype, temperature: float, draws: int = 6) -> float:
    """What gradients from recomputed logits may err by where eager's do not. A scaled logit of size Y errs by
    about 2**-24 Y; the entropy's gradient multiplies that by up to about 1 + Y, the product with the other
    matrix by its column sums over the temperature. Errors of both signs cancel: an eighth of the product,
    of which 840 random shapes in float32 took less than a half."""
    most = 0.0
    for seed in range(draws if shape[0] * shape[1] else 0):
        hidden, weight, _ = (t.double() for t in head_inputs(*shape, dtype, seed=seed))
        Y = float((hidden @ weight.T).abs().max()) / temperature
        sums = max(float(matrix.abs().sum(0).max()) for matrix in (hidden, weight))
        most = max(most, 2**-24 * Y * (1 + Y) * sums / temperature / 8)
    return most


def assert_errors(draw: Callable[[int], list[list[Tensor]]], draws: int, slack: float = 1e-6) -> None:
    """draw(seed) gives (our, eager and true) results in float64. Our largest error is at most twice eager's,
    plus `slack`.

    The largest over several draws where a shape is small: the largest error of a handful of roundings is
    luck.
    """
    ours, theirs = torch.zeros(0), torch.zeros(0)
    for seed in range(draws):
        mine, eager, truth = draw(seed)
        for t in (mine, eager):
            assert [x.shape for x in t] == [x.shape for x in truth]
        found = [
            torch.tensor(
                [float((a - b).abs().max()) if b.numel() else 0.0 for a, b in zip(t, truth, strict=True)]
            )
            for t in (mine, eager)
        ]
        # maximum keeps a NaN
        ours, theirs = (
            (found[0], found[1]) if seed == 0 else (ours.maximum(found[0]), theirs.maximum(found[1]))
        )
    assert (ours <= 2 * theirs + slack).all(), (ours, theirs)
