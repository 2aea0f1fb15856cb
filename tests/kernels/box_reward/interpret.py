"""Cases of the box-reward kernel; test_operator.py runs them under the interpreter and on the GPU."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from locus_kernels import dispatch
from locus_kernels.box_reward import REWARD_SHAPES, op, reference
from locus_kernels.box_reward import triton as kernels
from locus_kernels.box_reward.records import Scoring
from torch import Tensor

from tests.kernels.box_reward import cases
from tests.kernels.box_reward.cases import Vocabulary, byte_level, replies, sentencepiece
from tests.kernels.interpreter import device, poisoned_empty

DEVICE = device()
LANES = 4096 if DEVICE == "cpu" else 32  # the interpreter's time is in the programs
READINGS = [("first", "direct"), ("last", "direct"), ("answer", "think_answer")]
DIRECT = {"which": "last", "grammar": "direct"}


def scoring(
    group_size: int, shape: str = "iou", normalize_std: bool = True, progress: float = 0.0
) -> Scoring:
    return Scoring(group_size, shape, 0.1, normalize_std, progress)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_empty(monkeypatch)


def batch(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids, lengths = cases.padded(rows, [5, -100])
    return ids.to(DEVICE), lengths.to(DEVICE)


def table_of(vocabulary: Vocabulary):
    return cases.table_of(vocabulary, DEVICE)


def assert_equal(got, expected) -> None:
    """Bit for bit; a float64-checked rounding apart for advantages, whose sums may run in another order."""
    for name, a, b in zip(expected._fields, got, expected, strict=True):
        if name == "advantage":
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
            assert torch.equal(a == 0, b == 0)
        else:
            assert torch.equal(a, b), f"{name}: {(a != b).nonzero()[:5].tolist()}"


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize(("which", "grammar"), READINGS)
def test_reads_as_the_reference_does(make, which: str, grammar: str) -> None:
    vocabulary = make()
    table = table_of(vocabulary)
    rows = [row[:40] for row in replies(vocabulary, 4000, seed=7)]
    ids, lengths = batch(rows)
    expected = reference.read_boxes(ids, lengths, table, which=which, grammar=grammar)
    assert_equal(kernels.read_boxes(ids, lengths, table, which=which, grammar=grammar, lanes=LANES), expected)
    assert int(expected.valid.sum()) > 100
    assert int(expected.format_ok.sum()) > 100


def task(groups: int, size: int, tokens: int = 40, seed: int = 0):
    """Replies with boxes of their own near their targets, groups of them alike."""
    random_ = random.Random(seed)
    rows, targets = [], []
    for _ in range(groups):
        same = random_.random() < 0.3
        for k in range(size):
            x, y = (1, 2) if same else (random_.randrange(30), random_.randrange(30))
            text = f"[{x},{y},{x + 20},{y + 25}]"
            text = text if same or random_.random() < 0.8 else text[: random_.randrange(len(text))]
            rows.append(byte_level().spell(text, random.Random(k))[:tokens])
            targets.append([5.0, 6.0, 27.0, 30.0])
    ids, lengths = batch(rows)
    return ids, lengths, torch.tensor(targets, device=DEVICE).reshape(-1, 4)


@pytest.mark.parametrize("shape", REWARD_SHAPES)
def test_rewards_as_the_reference_does(shape: str) -> None:
    table = table_of(byte_level())
    size, normalize = (5, False) if "iou" in shape else (8, True)
    ids, lengths, targets = task(10, size)
    arguments = (ids, lengths, table, targets, scoring(size, shape, normalize, 0.4))
    got = kernels.box_reward(*arguments, **DIRECT, lanes=LANES)
    assert_equal(got, reference.box_reward(*arguments, **DIRECT))
    assert 0 < int(got.zero_variance.sum()) < 10
    groups = got.reward.double().view(-1, size)
    centred = groups - groups.mean(1, keepdim=True)
    truth = centred / (groups.std(1, keepdim=True) + 1e-6) if normalize else centred
    torch.testing.assert_close(
        got.advantage.double().view(-1, size),
        truth.masked_fill(got.zero_variance[:, None], 0),
        atol=2e-5,
        rtol=2e-5,
    )
    assert (got.advantage.view(-1, size)[got.zero_variance] == 0).all()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    groups=st.integers(0, 7),
    size=st.sampled_from([1, 2, 3, 7, 13, 16, 31]),
    lanes=st.sampled_from([32, 256]),
    seed=st.integers(0, 9),
)
def test_any_number_of_rows_and_any_group(groups: int, size: int, lanes: int, seed: int) -> None:
    table = table_of(byte_level())
    ids, lengths, targets = task(groups, size, tokens=12, seed=seed)
    arguments = (ids, lengths, table, targets, scoring(size))
    got = kernels.box_reward(*arguments, **DIRECT, lanes=lanes)
    assert_equal(got, reference.box_reward(*arguments, **DIRECT))
    again = kernels.box_reward(*arguments, **DIRECT, lanes=lanes)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint64]
)
def test_integer_types_and_strides(dtype: torch.dtype) -> None:
    table = table_of(byte_level())
    ids, lengths = batch(
        [byte_level().spell(text, random.Random(1)) for text in ("[1,2,3,4]", "[5, 6.5,70,80]", "x")]
    )
    ids = ids.clamp(0, 250).to(dtype)
    wide = torch.full((6, ids.shape[1] * 2), 99, dtype=dtype, device=DEVICE)
    wide[::2, ::2] = ids
    spread = torch.full((6,), 3, dtype=dtype, device=DEVICE)
    spread[::2] = lengths.to(dtype)
    expected = reference.read_boxes(ids, lengths, table, which="first", grammar="direct")
    for shown, counts in ((wide[::2, ::2], spread[::2]), (ids.t().contiguous().t(), lengths.to(dtype))):
        assert_equal(kernels.read_boxes(shown, counts, table, which="first", grammar="direct"), expected)


def test_wild_ids_and_lengths_stay_inside() -> None:
    """Ids far outside the vocabulary fit nowhere, and lengths beyond L read nothing past L: what lies there
    would complete the box."""
    table = table_of(byte_level())
    generator = torch.Generator().manual_seed(0)
    wild = torch.randint(-(2**62), 2**62, (64, 24), generator=generator)
    near = torch.randint(-3, table.vocab_size + 3, (64, 24), generator=generator)
    edges = torch.tensor([-1, table.vocab_size, 2**31, 2**32, 2**32 + 20, -(2**63), 2**63 - 1, 3]).repeat(
        64, 3
    )
    for ids in (wild, near, edges):
        lengths = torch.randint(-(2**40), 2**40, (64,), generator=generator)
        arguments, choices = (
            (ids.to(DEVICE), lengths.to(DEVICE), table),
            {"which": "first", "grammar": "direct"},
        )
        assert_equal(kernels.read_boxes(*arguments, **choices), reference.read_boxes(*arguments, **choices))
    box = byte_level().spell("[1,2,3,4]", random.Random(0))
    whole = torch.tensor([box, box], device=DEVICE)
    cut = kernels.read_boxes(
        whole[:, :-1], torch.tensor([2**40, 10**9], device=DEVICE), table, which="first", grammar="direct"
    )
    assert not cut.valid.any()
    assert not kernels.read_boxes(
        whole, torch.tensor([-1, 0], device=DEVICE), table, which="first", grammar="direct"
    ).valid.any()


@pytest.mark.parametrize(("rows", "tokens"), [(0, 0), (0, 5), (3, 0), (3, 1)])
def test_empty(rows: int, tokens: int) -> None:
    table = table_of(byte_level())
    ids, lengths = (
        torch.zeros(rows, tokens, dtype=torch.int64, device=DEVICE),
        torch.full((rows,), 9, device=DEVICE),
    )
    targets = torch.zeros(rows, 4, device=DEVICE)
    got = kernels.box_reward(ids, lengths, table, targets, scoring(3), **DIRECT)
    assert [list(x.shape) for x in got] == [[rows, 4], [rows], [rows], [rows], [rows], [rows], [rows // 3]]
    assert not any(x.any() for x in got[:6])
    assert got.zero_variance.all()


def test_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches, plain = [], kernels.box_reward_kernel

    class Counting:
        def __getitem__(self, grid):
            launches.append(grid)
            return plain[grid]

    monkeypatch.setattr(kernels, "box_reward_kernel", Counting())
    ids, lengths, targets = task(4, 8, tokens=6)
    table = table_of(byte_level())  # its copies to the device are not the operator's
    with torch.profiler.profile() as profile:
        kernels.box_reward(ids, lengths, table, targets, scoring(8), **DIRECT)
    assert launches == [(1,)]
    counted = {e.key for e in profile.key_averages() if e.key.startswith("aten::")}
    reading_back = {"aten::item", "aten::copy_", "aten::_local_scalar_dense", "aten::nonzero"}
    assert not counted & reading_back or DEVICE == "cpu"


def test_the_public_functions_on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "on_kernels", lambda tensor: True)
    ids, lengths, targets = task(2, 4, tokens=16)
    table, choices = table_of(byte_level()), {"which": "first", "grammar": "direct"}
    earned = op.box_reward(ids, lengths, table, targets, 4, **choices, shape="ramp", progress=0.2)
    expected = Scoring(4, "ramp", 0.1, True, 0.2)
    assert_equal(earned, reference.box_reward(ids, lengths, table, targets, expected, **choices))
    reading = reference.read_boxes(ids, lengths, table, **choices)
    assert_equal(op.read_boxes(ids, lengths, table, **choices), reading)


def test_bad_input() -> None:
    table, limit = table_of(byte_level()), kernels.MAX_GROUP
    ids, lengths, targets = task(1, limit + 1, tokens=3)
    with pytest.raises(ValueError, match=rf"expected 1 \.\. {limit}, got {limit + 1}"):
        kernels.box_reward(ids, lengths, table, targets, scoring(limit + 1), **DIRECT)
    wrong = dataclasses.replace(table, offsets=table.offsets.long())
    message = r"table.offsets: expected a contiguous torch.int32 vector, got torch.int64"
    with pytest.raises(ValueError, match=message):
        kernels.read_boxes(ids, lengths, wrong, which="first", grammar="direct")
