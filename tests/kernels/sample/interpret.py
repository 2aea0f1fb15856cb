"""Cases of the sampling kernels; test_sample.py runs them under the interpreter and on the GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from locus_kernels.sample import reference
from locus_kernels.sample import triton as kernels
from locus_kernels.sample.reference import Distribution, Place
from locus_kernels.sample.triton import TILE
from torch import Tensor

from tests.kernels.interpreter import device, poisoned_empty

DEVICE = device()
DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "allowed": None, "seed": 11, "position": 3}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_empty(monkeypatch)


def records(logits: Tensor, **choices) -> tuple[Place, Distribution]:
    """The operator's arguments: `DEFAULTS`, a stream of each row's own, and these choices."""
    given = DEFAULTS | {"row": torch.arange(len(logits), device=DEVICE)} | choices
    place, distribution = ({name: given[name] for name in of._fields} for of in (Place, Distribution))
    return Place(**place), Distribution(**distribution)


def by_kernel(logits: Tensor, tile: int, **choices) -> tuple[Tensor, Tensor]:
    return kernels.sample(logits, *records(logits, **choices), tile=tile)


def draws(logits: Tensor, tile: int, **choices) -> tuple[Tensor, Tensor]:
    """Sampled twice by the kernel (equal bits), checked against float64 truth and the reference; returns
    (ids, log-prob)."""
    arguments = DEFAULTS | choices
    ids, logprob = by_kernel(logits, tile, **choices)
    again = by_kernel(logits, tile, **choices)
    assert torch.equal(ids, again[0])
    assert torch.equal(logprob, again[1])
    assert ((ids >= 0) & (ids < logits.shape[1])).all()
    expected, eager = reference.sample(logits, *records(logits, **choices))
    assert torch.equal(ids, expected)
    truth = (logits.double() / (arguments["temperature"] or 1)).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    bound = 2 * (eager.double() - truth).abs().max() + 1e-6 if len(ids) else 0
    assert ((logprob.double() - truth).abs() <= bound).all()
    return ids, logprob


def some_logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    return (
        (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows * vocab)) * scale)
        .to(dtype)
        .to(DEVICE)
    )


def mask(vocab: int) -> Tensor:
    allowed = torch.rand(vocab, generator=torch.Generator().manual_seed(vocab)) < 0.6
    allowed[vocab // 2] = True
    return allowed.to(DEVICE)


CHOICES = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6, "masked": True},
    {"top_k": 4, "temperature": 1.7},
    {"top_p": 0.7},
    {"top_k": 9, "top_p": 0.9, "masked": True},
    {"temperature": 0.0, "masked": True},
]


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_draws_as_the_reference_does(choices: dict, dtype: torch.dtype) -> None:
    for rows, vocab, tile in ((2, 1009, 512), (1, 513, 512)) if dtype == torch.float32 else ((2, 255, 256),):
        chosen = {k: v for k, v in choices.items() if k != "masked"} | (
            {"allowed": mask(vocab)} if "masked" in choices else {}
        )
        draws(some_logits(rows, vocab, dtype), tile, **chosen)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 2),
    vocab=st.integers(1, 200),
    tile=st.sampled_from([32, 256]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([1.0, 0.3, 0.99]),
)
def test_any_size(rows: int, vocab: int, tile: int, top_k: int, top_p: float) -> None:
    draws(some_logits(rows, vocab), tile, top_k=top_k, top_p=top_p, position=vocab)


@pytest.mark.parametrize("choices", [{}, {"temperature": 0.0}])
@pytest.mark.parametrize("vocab", [151_936, 151_669])
def test_real_vocabularies(vocab: int, choices: dict) -> None:
    draws(some_logits(2, vocab), TILE, **choices)


def test_rows_with_strides() -> None:
    logits = some_logits(6, 300)
    wide = torch.full((6, 900), 50.0, device=DEVICE)
    wide[:, 100:400] = logits
    turned = logits.t().contiguous().t()
    plain = draws(logits, 128)
    for shown in (wide[:, 100:400], turned):
        got = draws(shown, 128)
        assert torch.equal(got[0], plain[0])
        assert torch.equal(got[1], plain[1])
    assert torch.equal(
        draws(wide[::2, 100:400], 128, row=torch.arange(6, device=DEVICE)[::2])[0], plain[0][::2]
    )


def test_a_row_does_not_depend_on_its_batch_nor_on_how_its_position_is_told() -> None:
    logits, row = some_logits(7, 400, scale=1.0), torch.tensor([5, 2**40, 0, -3, 8, 9, 77], device=DEVICE)
    ids, logprob = draws(logits, 256, row=row, position=12)
    for k in range(7):
        alone = draws(logits[k : k + 1], 256, row=row[k : k + 1], position=12)
        assert (alone[0], alone[1]) == (ids[k : k + 1], logprob[k : k + 1])
    back = draws(logits.flip(0), 256, row=row.flip(0), position=torch.full((7,), 12, device=DEVICE))
    assert torch.equal(back[0].flip(0), ids)
    assert torch.equal(draws(logits, 256, row=row, position=torch.tensor(12, device=DEVICE))[0], ids)
    assert not torch.equal(draws(logits, 256, row=row, position=13)[0], ids)
    assert not torch.equal(draws(logits, 256, row=row, position=12, seed=2**63 + 5)[0], ids)


def test_extremes() -> None:
    """Tokens at -inf, one allowed id far below the rest, huge and equal logits, and a whole tile of -inf."""
    inf = torch.inf
    logits = some_logits(4, 70)
    logits[0] = -inf
    logits[0, 69] = -200.0
    logits[1, :64] = -inf
    logits[2] = 3e38 * torch.where(torch.arange(70, device=DEVICE) == 17, 1.0, -1.0)
    logits[3] = 7.0
    only = torch.zeros(70, dtype=torch.bool, device=DEVICE)
    only[69] = True
    for choices in ({}, {"temperature": 0.0}, {"top_k": 2, "top_p": 0.01}):
        ids, _ = by_kernel(logits, 32, **choices)
        assert ids[0] == 69
        assert ids[1] >= 64
        assert ids[2] == 17
        assert (by_kernel(logits[[0, 1, 3]], 32, **choices, allowed=only)[0] == 69).all()
    far = some_logits(2, 70)
    far[:, 69] = -500.0
    ids, logprob = draws(far, 32, allowed=only)
    assert (ids == 69).all()
    assert (logprob < -490).all()
    assert draws(torch.full((1, 70), 7.0, device=DEVICE), 32, temperature=0.0)[0] == 0
    tied = torch.zeros(24, 6, device=DEVICE)
    tied[:, 5] = -1.0
    assert draws(tied, 16, top_k=2)[0].unique().tolist() == [0, 1, 2, 3, 4]


def test_rows_without_a_distribution_stay_in_range() -> None:
    logits = some_logits(4, 40)
    logits[0], logits[1], logits[2, 3], logits[3, :] = -torch.inf, torch.nan, torch.inf, torch.inf
    for choices in ({}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.4}):
        ids, _ = by_kernel(logits, 16, **choices)
        assert ((ids >= 0) & (ids < 40)).all()
