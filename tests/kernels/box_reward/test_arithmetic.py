"""Overlaps, reward shapes, advantages and the whole reward of the box-reward op, against hand values and
float64."""

from __future__ import annotations

import random
import time

import pytest
import torch
from locus_kernels.box_reward import REWARD_SHAPES, box_reward, giou, group_advantage, iou
from torch import Tensor

from tests.kernels.box_reward.cases import byte_level, table_of

UNIT_SQUARE = [0.0, 0.0, 1.0, 1.0]
OVERLAPS = [  # box, box, IoU, GIoU
    (UNIT_SQUARE, UNIT_SQUARE, 1.0, 1.0),
    ([0.0, 0, 2, 2], [1.0, 1, 3, 3], 1 / 7, 1 / 7 - 2 / 9),
    ([0.0, 0, 4, 2], [0.0, 0, 2, 2], 0.5, 0.5),
    (UNIT_SQUARE, [2.0, 0, 3, 1], 0.0, -1 / 3),
    (UNIT_SQUARE, [1.0, 1, 2, 2], 0.0, -0.5),
    ([-2.0, -2, 2, 2], [-1.0, -1, 1, 1], 0.25, 0.25),
    ([1.0, 1, 1, 1], UNIT_SQUARE, 0.0, 0.0),
    ([3.0, 3, 3, 3], [3.0, 3, 3, 3], 0.0, 0.0),
    ([1.0, 1, 0, 0], UNIT_SQUARE, 0.0, 0.0),
    ([0.0, 0, 0, 0], [0.0, 0, 0, 0], 0.0, 0.0),
    ([-1e6, -1e6, 1e6, 1e6], [0.0, 0, 1e6, 1e6], 0.25, 0.25),
]


@pytest.mark.parametrize(("a", "b", "expected_iou", "expected_giou"), OVERLAPS)
def test_overlap_by_hand(a: list[float], b: list[float], expected_iou: float, expected_giou: float) -> None:
    for first, second in ((a, b), (b, a)):
        assert float(iou(torch.tensor(first), torch.tensor(second))) == pytest.approx(expected_iou, abs=1e-7)
        assert float(giou(torch.tensor(first), torch.tensor(second))) == pytest.approx(
            expected_giou, abs=1e-7
        )


def random_boxes(count: int, seed: int) -> Tensor:
    corners = (
        torch.randint(-50, 1000, (count, 2, 2), generator=torch.Generator().manual_seed(seed)).float() + 0.25
    )
    return corners.flatten(1)  # a quarter of them ordered, the others degenerate


def test_overlap_against_float64_and_never_nan() -> None:
    a, b = random_boxes(20_000, 0), random_boxes(20_000, 1)
    a[:5000], b[:5000] = (
        torch.cat([x[:5000, :2].minimum(x[:5000, 2:]), x[:5000, :2].maximum(x[:5000, 2:]) + 1], 1)
        for x in (a, b)
    )
    for function in (iou, giou):
        assert function(a, b).dtype == torch.float32
        torch.testing.assert_close(
            function(a, b).double(), function(a.double(), b.double()), atol=1e-6, rtol=0
        )
        assert function(a, b).isfinite().all()
        assert (function(a, b).abs() <= 1).all()
    degenerate = ~(a[:, 2:] > a[:, :2]).all(1) | ~(b[:, 2:] > b[:, :2]).all(1)
    assert (iou(a, b)[degenerate] == 0).all()
    assert iou(a.view(100, 200, 4), b.view(100, 200, 4)).shape == (100, 200)
    ordered = ~degenerate
    grid = torch.stack([a[ordered], b[ordered]], 1).double()[:20]
    counted = torch.tensor([count_cells(p, q) for p, q in grid], dtype=torch.float64)
    torch.testing.assert_close(iou(grid[:, 0], grid[:, 1]), counted)


def count_cells(p: Tensor, q: Tensor) -> float:
    """IoU of two boxes on whole coordinates (plus a common offset) by counting unit cells."""
    cells = torch.zeros(2, 1100, 1100, dtype=torch.bool)
    for layer, box in zip(cells, (p, q), strict=True):
        x1, y1, x2, y2 = (int(c + 50) for c in box)
        layer[y1:y2, x1:x2] = True
    return float((cells[0] & cells[1]).sum() / (cells[0] | cells[1]).sum())


def test_iou_is_the_same_in_a_stretched_frame() -> None:
    a, b = random_boxes(1000, 2).double(), random_boxes(1000, 3).double()
    stretch = torch.tensor([1.18, 0.37, 1.18, 0.37], dtype=torch.float64)
    torch.testing.assert_close(iou(a, b), iou(a * stretch, b * stretch))


# ----------------------------------------------------------------------------------------------------- shapes
TARGET = [0.0, 0, 10, 10]
SHAPES = [  # IoU with the target (the box lies within it), progress, expected
    ("iou", 0.3, 0.0, 0.3),
    ("iou", 1.0, 1.0, 1.0),
    ("iou_squared", 0.3, 0.0, 0.09),
    ("iou_over_half", 0.5, 0.0, 0.0),
    ("iou_over_half", 0.6, 0.0, 0.6),
    ("giou", 0.3, 0.0, 0.3),
    ("giou_plus_one", 0.3, 0.0, 1.3),
    ("threshold", 0.4, 0.0, 0.0),
    ("threshold", 0.5, 0.0, 1.0),
    ("ramp", 0.4, 0.0, 0.0),
    ("ramp", 0.5, 0.0, 0.0),
    ("ramp", 0.6, 0.0, 0.4),
    ("ramp", 0.75, 0.0, 1.0),
    ("ramp", 0.9, 0.0, 1.0),
    ("rising", 0.2, 0.0, 0.0),
    ("rising", 0.25, 0.0, 1.0),
    ("rising", 0.4, 0.5, 0.0),
    ("rising", 0.5, 0.5, 1.0),
    ("rising", 0.7, 1.0, 0.0),
    ("rising", 0.75, 1.0, 1.0),
]


@pytest.mark.parametrize(("name", "overlap", "progress", "expected"), SHAPES)
def test_shapes_by_hand(name: str, overlap: float, progress: float, expected: float) -> None:
    predicted = torch.tensor([[0.0, 0, 10, 10 * overlap]])
    value = REWARD_SHAPES[name](predicted, torch.tensor([TARGET]), progress)
    assert value.dtype == torch.float32
    assert value.tolist() == pytest.approx([expected], abs=1e-6)


def test_shapes_of_far_and_degenerate_boxes() -> None:
    predicted = torch.tensor([[20.0, 0, 30, 10], [0, 0, 0, 0], [10, 10, 0, 0], [0, 0, 10, 0]])
    values = {
        name: shape(predicted, torch.tensor([TARGET] * 4), 0.5).tolist()
        for name, shape in REWARD_SHAPES.items()
    }
    assert values.pop("giou") == pytest.approx([-1 / 3, 0, 0, 0])
    assert values.pop("giou_plus_one") == pytest.approx([2 / 3, 0, 0, 0])
    assert set(values) == {"iou", "iou_squared", "iou_over_half", "threshold", "ramp", "rising"}
    assert all(value == [0] * 4 for value in values.values())


# -------------------------------------------------------------------------------------------------- advantage
def test_advantage_by_hand() -> None:
    reward = torch.tensor([0.0, 1, 0, 1, 0.2, 0.4, 0.6, 0.8])
    advantage, zero = group_advantage(reward, 4)
    half, step = 0.5 / (3**-0.5), (0.05 / 0.75) ** 0.5
    expected = [-half, half, -half, half, -0.3 / step, -0.1 / step, 0.1 / step, 0.3 / step]
    torch.testing.assert_close(advantage, torch.tensor(expected), atol=1e-5, rtol=0)
    assert zero.tolist() == [False, False]
    plain, _ = group_advantage(reward, 4, normalize_std=False)
    torch.testing.assert_close(plain, torch.tensor([-0.5, 0.5, -0.5, 0.5, -0.3, -0.1, 0.1, 0.3]))
    soft, _ = group_advantage(torch.tensor([0.0, 2.0]), 2, eps=1.0)
    torch.testing.assert_close(soft, torch.tensor([-1.0, 1.0]) / (2**0.5 + 1))


def test_advantage_against_float64() -> None:
    reward = torch.rand(64 * 7, generator=torch.Generator().manual_seed(0))
    groups = reward.double().view(64, 7)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(
        group_advantage(reward, 7)[0].double().view(64, 7), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("normalize_std", [True, False])
def test_equal_rewards_have_exactly_no_advantage(normalize_std: bool) -> None:
    values = torch.tensor([0.1, 1 / 3, 0.7, 1e-30, 0.9 * 0.4316 + 0.1])
    for size in (2, 3, 7, 8):
        advantage, zero = group_advantage(values.repeat_interleave(size), size, normalize_std)
        assert zero.all()
        assert (advantage == 0).all()
    advantage, zero = group_advantage(values, 1, normalize_std)
    assert zero.all()
    assert (advantage == 0).all()
    nearly = torch.tensor([1.0, 1.0, 1.0000001])
    assert not group_advantage(nearly, 3, normalize_std)[1].any()
    empty, none = group_advantage(torch.zeros(0), 8, normalize_std)
    assert (empty.shape, none.shape) == ((0,), (0,))


def test_advantage_errors() -> None:
    for wrong, message in (
        (torch.zeros(4, dtype=torch.float64), "float64"),
        (torch.zeros(2, 2), r"\[2, 2\]"),
    ):
        with pytest.raises(ValueError, match=rf"reward: expected float32 \[rows\], got .*{message}"):
            group_advantage(wrong, 2)
    with pytest.raises(ValueError, match="positive divisor of the 4 rows, got 3"):
        group_advantage(torch.zeros(4), 3)


# ----------------------------------------------------------------------------------------------------- reward
REPLIES = [
    "<think>there</think><answer>[0, 0, 10, 5]</answer>",  # IoU 0.5, well formed
    "<answer>[0, 0, 10, 10]</answer>",  # IoU 1, not well formed
    "<think>?</think><answer>none</answer>",  # no box, well formed
    "[0, 0, 10, 10]",  # nothing that counts
]


def written(texts: list[str]) -> tuple[Tensor, Tensor]:
    rows = [byte_level().spell(text, random.Random(text)) for text in texts]
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]), torch.tensor(
        [len(row) for row in rows]
    )


def test_whole_reward_by_hand() -> None:
    table = table_of(byte_level())
    ids, lengths = written([*REPLIES, *[REPLIES[0]] * 4])
    earned = box_reward(ids, lengths, table, torch.tensor([TARGET] * 8), 4)
    assert earned.box[:2].tolist() == [[0, 0, 10, 5], [0, 0, 10, 10]]
    assert earned.valid.tolist()[:4] == [True, True, False, False]
    assert earned.format_ok.tolist()[:4] == [True, False, True, False]
    assert earned.iou.tolist()[:4] == [0.5, 1.0, 0.0, 0.0]
    torch.testing.assert_close(earned.reward[:4], torch.tensor([0.55, 0.9, 0.1, 0.0]))
    advantage, zero = group_advantage(earned.reward, 4)
    assert torch.equal(earned.advantage, advantage)
    assert earned.zero_variance.tolist() == zero.tolist() == [False, True]
    assert (earned.advantage[4:] == 0).all()
    plain = box_reward(ids, lengths, table, torch.tensor([TARGET] * 8), 4, normalize_std=False)
    torch.testing.assert_close(plain.advantage[:4], earned.reward[:4] - 1.55 / 4)
    direct = box_reward(
        ids,
        lengths,
        table,
        torch.tensor([TARGET] * 8),
        2,
        shape="giou_plus_one",
        format_weight=0.5,
        which="last",
        grammar="direct",
    )
    torch.testing.assert_close(direct.reward[:4], torch.tensor([0.75, 1.0, 0.0, 1.5]))
    assert direct.iou.tolist()[:4] == [0.5, 1.0, 0.0, 1.0]
    late = box_reward(
        ids, lengths, table, torch.tensor([TARGET] * 8), 8, shape="rising", progress=1.0, format_weight=0.0
    )
    assert late.reward.tolist()[:4] == [0, 1, 0, 0]


def test_no_box_earns_nothing_under_any_shape() -> None:
    table = table_of(byte_level())
    ids, lengths = written(
        ["<answer>[10, 10, 0, 0]</answer>", "<answer></answer>", "<answer>[0,0,9999999,9999999]</answer>"]
    )
    for shape in REWARD_SHAPES:
        assert box_reward(
            ids, lengths, table, torch.tensor([TARGET] * 3), 3, shape=shape
        ).reward.tolist() == [0, 0, 0]


def test_a_step_of_short_replies_takes_milliseconds() -> None:
    """192 replies of 16 tokens cost a few milliseconds; the bound is loose because other work may share the
    machine."""
    table = table_of(byte_level())
    ids = torch.randint(table.vocab_size, (192, 16), generator=torch.Generator().manual_seed(0))
    arguments = (ids, torch.full((192,), 16), table, torch.tensor([TARGET] * 192), 8)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        box_reward(*arguments)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.1
