"""Sampling: distribution, independence, cuts and errors of the public function. The kernels' cases are in
interpret.py."""

from __future__ import annotations

import pytest
import torch
from locus_kernels.sample import op, sample
from locus_kernels.sample.reference import Place, uniform
from torch import Tensor

from tests.kernels.interpreter import WAYS, run_cases


@pytest.mark.parametrize("interpret", WAYS)
def test_kernels(interpret: bool, subtests: pytest.Subtests) -> None:
    run_cases("sample/interpret.py", interpret, subtests=subtests)


LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, -torch.inf, 1.0, 0.3])
DRAWS = 20_000


def many(row: Tensor | None = None, **choices) -> Tensor:
    return sample(
        LOGITS.expand(DRAWS, -1),
        row=torch.arange(DRAWS) if row is None else row,
        **{"seed": 5, "position": 0} | choices,
    )[0]


def chi_square(ids: Tensor, probability: Tensor) -> float:
    """Pearson's statistic of the counts; ids that cannot be drawn must not be."""
    counts = torch.bincount(ids, minlength=len(probability)).double()
    expected = probability.double() * len(ids)
    assert (counts[expected == 0] == 0).all()
    return float(((counts - expected).square() / expected)[expected > 0].sum())


MASK = torch.tensor([False, True, True, True, True, True, True])
CUTS = [  # choices, ids that remain
    ({}, [0, 1, 2, 3, 5, 6]),
    ({"temperature": 2.5}, [0, 1, 2, 3, 5, 6]),
    ({"top_k": 3}, [0, 2, 5]),
    ({"top_p": 0.75}, [0, 2, 5]),
    ({"top_k": 3, "top_p": 0.7, "temperature": 1.0}, [0, 5]),
    ({"allowed": MASK}, [1, 2, 3, 5, 6]),
    ({"allowed": MASK, "top_k": 2}, [2, 5]),
]


@pytest.mark.parametrize(("choices", "left"), CUTS)
def test_distribution(choices: dict, left: list[int]) -> None:
    """20,000 rows of one distribution, and 20,000 positions of one row: 99.99% of fair samplers stay below
    27.9 with 6 degrees of freedom."""
    scaled = (LOGITS / choices.get("temperature", 1.0)).double()
    cut = torch.full_like(scaled, -torch.inf)
    cut[left] = scaled[left]
    assert chi_square(many(**choices), cut.softmax(-1)) < 27.9
    moving = many(row=torch.zeros(DRAWS, dtype=torch.int64), position=torch.arange(DRAWS), **choices)
    assert chi_square(moving, cut.softmax(-1)) < 27.9


def test_neighbouring_rows_positions_and_seeds_are_independent() -> None:
    first = many()
    shifted = {
        "row": many(row=torch.arange(1, DRAWS + 1)),
        "position": many(position=1),
        "seed": many(seed=6),
    }
    for name, second in shifted.items():
        table = torch.bincount(first * 7 + second, minlength=49).view(7, 7).double()
        expected = table.sum(1, keepdim=True) * table.sum(0) / DRAWS
        statistic = float(((table - expected).square() / expected)[expected > 0].sum())
        assert statistic < 63, name  # 99.99% with 25 degrees of freedom is 61.0


def test_greedy_and_logprob() -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        torch.bfloat16
    )
    logits[0, :] = 1.0
    row = torch.arange(9)
    ids, logprob = sample(logits, seed=0, row=row, position=0, temperature=0.0)
    assert torch.equal(ids, logits.float().argmax(-1))
    assert ids[0] == 0
    torch.testing.assert_close(logprob, logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0])
    allowed = torch.arange(50) == 31
    ids, logprob = sample(
        logits,
        seed=0,
        row=row,
        position=0,
        temperature=0.7,
        top_k=5,
        top_p=0.5,
        allowed=allowed,
        validate=True,
    )
    assert (ids == 31).all()
    torch.testing.assert_close(logprob, (logits.float() / 0.7).log_softmax(-1)[:, 31])


def test_no_rows() -> None:
    ids, logprob = sample(torch.zeros(0, 5), seed=0, row=torch.zeros(0, dtype=torch.int64), position=0)
    assert (ids.dtype, ids.shape, logprob.dtype, logprob.shape) == (torch.int64, (0,), torch.float32, (0,))


def test_operator_is_registered_soundly_and_survives_compilation_whole() -> None:
    logits, row = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    torch.library.opcheck(op._operator, (logits, 1, row, None, 5, 0.9, 0.8, 3, None))
    torch.library.opcheck(
        op._operator, (logits, 1, row, row, 0, 0.0, 1.0, 0, torch.ones(30, dtype=torch.bool))
    )

    def draw(logits: Tensor) -> tuple[Tensor, Tensor]:
        return sample(logits, seed=2**64 - 1, row=row, position=7, temperature=0.9, top_p=0.9)

    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(logits), draw(logits), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits: expected float32, .*got torch.float32 \[3\]"),
        ({"logits": torch.zeros(3, 0)}, r"got torch.float32 \[3, 0\]"),
        ({"logits": torch.zeros(3, 5, dtype=torch.float64)}, "got torch.float64"),
        ({"row": torch.zeros(3)}, r"row: expected int64 \[3\], got torch.float32"),
        ({"row": torch.zeros(2, dtype=torch.int64)}, r"row: expected int64 \[3\], got torch.int64 \[2\]"),
        ({"position": torch.zeros(2, dtype=torch.int64)}, r"position: expected a number, or int64 \[3\]"),
        (
            {"row": torch.zeros(3, dtype=torch.int64, device="meta")},
            "row: expected the device of logits, cpu, got meta",
        ),
        ({"allowed": torch.ones(4, dtype=torch.bool)}, r"allowed: expected bool \[5\], got torch.bool \[4\]"),
        ({"allowed": torch.ones(5)}, r"allowed: expected bool \[5\], got torch.float32"),
        ({"temperature": -1.0}, "0 <= temperature"),
        ({"temperature": float("nan")}, "0 <= temperature"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"top_k": -1}, "0 <= top_k"),
        ({"allowed": torch.zeros(5, dtype=torch.bool), "validate": True}, "an allowed id above -inf"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(change: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(3, 5), "seed": 0, "row": torch.arange(3), "position": 0} | change
    with pytest.raises(ValueError, match=message):
        sample(**arguments)


def test_streams_of_seeds_and_positions_have_nothing_in_common() -> None:
    row = torch.arange(20_000)
    streams = [
        uniform(Place(seed, row, position)) for seed, position in ((0, 0), (0, 1), (1, 0), (1, 1), (2**40, 0))
    ]
    assert len(torch.cat(streams).unique()) == 100_000  # neighbouring seeds are no shifted copies
    correlation = torch.corrcoef(torch.stack(streams)).fill_diagonal_(0).abs()
    assert correlation.max() < 0.04
    assert all(abs(stream.mean() - 0.5) < 0.01 for stream in streams)
