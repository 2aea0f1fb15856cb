"""What lies at the edges of the reader's inputs, and what is refused."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from locus_kernels.box_reward import REWARD_SHAPES, box_reward, read_boxes, reference
from locus_kernels.box_reward.records import Scoring

from tests.kernels.box_reward.cases import Vocabulary, assert_agrees, batch, byte_level, table_of


def test_ids_outside_the_vocabulary_fit_nowhere_and_lengths_are_bounded() -> None:
    vocabulary = byte_level()
    table, box = table_of(vocabulary), vocabulary.spell("[1,2,3,4]", random.Random(0))
    for wrong in (-1, -(2**40), vocabulary.vocab_size, 2**40, 2**32 + box[1]):
        rows = [[wrong, *box], [*box[:3], wrong, *box[3:]], [*box, wrong]]
        reading = read_boxes(*batch(rows), table, which="first", grammar="direct")
        assert reading.valid.tolist() == [True, False, True]
        assert not reading.format_ok.any()
        with pytest.raises(
            ValueError, match=rf"ids: expected values in \[0, {vocabulary.vocab_size}\), got \[{wrong}\]"
        ):
            read_boxes(*batch(rows), table, validate=True)
    ids = torch.tensor([box, box])
    assert read_boxes(ids, torch.tensor([10**9, -5]), table, which="first").valid.tolist() == [True, False]
    for lengths in ([10**9, 0], [-5, 0]):
        with pytest.raises(ValueError, match="lengths: expected values in"):
            read_boxes(ids, torch.tensor(lengths), table, validate=True)


def test_every_length_is_read_up_to_exactly_there(vocabulary: Vocabulary) -> None:
    row = vocabulary.spell("<think>[1,2,3,4]</think><answer>[5,6,70,80]</answer> [1,1,2,2]", random.Random(3))
    prefixes = [row[:n] for n in range(len(row) + 1)]
    ids, lengths = torch.tensor([row] * len(prefixes)), torch.arange(len(prefixes))
    for which, grammar in (("first", "think_answer"), ("last", "direct"), ("answer", "think_answer")):
        assert_agrees(prefixes, vocabulary.decode(prefixes), table_of(vocabulary), which, grammar)
        cut = read_boxes(ids, lengths, table_of(vocabulary), which=which, grammar=grammar)
        for a, b in zip(
            cut, read_boxes(*batch(prefixes), table_of(vocabulary), which=which, grammar=grammar), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint32, torch.uint64]
)
def test_empty_batches_strides_and_integer_types(dtype: torch.dtype) -> None:
    table = table_of(byte_level())
    for rows, tokens in ((0, 0), (0, 5), (3, 0)):
        earned = box_reward(
            torch.zeros(rows, tokens, dtype=dtype),
            torch.full((rows,), 9, dtype=dtype),
            table,
            torch.zeros(rows, 4),
            3,
        )
        assert [list(t.shape) for t in earned] == [
            [rows, 4],
            [rows],
            [rows],
            [rows],
            [rows],
            [rows],
            [rows // 3],
        ]
        assert not earned.valid.any()
        assert not earned.reward.any()
    ids, lengths = batch([byte_level().spell("[1,2,3,4]", random.Random(0))] * 2)
    turned = ids.to(dtype).t().contiguous().t()
    assert read_boxes(turned, lengths.to(dtype), table, which="first", validate=True).valid.all()


def test_nothing_is_read_back_from_the_device() -> None:
    """Tensors without data have nothing to give to the host: any copy to it raises."""
    table = table_of(byte_level()).to("meta")
    ids = torch.empty(8, 6, dtype=torch.int32, device="meta")
    lengths, target = torch.empty(8, dtype=torch.int64, device="meta"), torch.empty(8, 4, device="meta")
    for shape, which in itertools.product(REWARD_SHAPES, ("first", "last", "answer")):
        scoring, reading = Scoring(4, shape, 0.1, True, 0.5), {"which": which, "grammar": "direct"}
        earned = reference.box_reward(ids, lengths, table, target, scoring, **reading)
        assert earned.advantage.shape == (8,)
        same = box_reward(ids, lengths, table, target, 4, shape=shape, which=which)
        for a, b in zip(same, earned, strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(4, 3)}, "ids: expected an integer tensor, got torch.float32"),
        ({"ids": torch.zeros(4, 3, dtype=torch.bool)}, "ids: expected an integer tensor, got torch.bool"),
        ({"lengths": torch.zeros(4)}, "lengths: expected an integer tensor, got torch.float32"),
        (
            {"lengths": torch.zeros(4, dtype=torch.int64, device="meta")},
            "lengths: expected the token table's device cpu, got meta",
        ),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"got \[4, 3\] and \[3\]"),
        ({"ids": torch.zeros(4, dtype=torch.int64)}, r"expected ids \[rows, tokens\]"),
        (
            {"target_boxes": torch.zeros(4, 3)},
            r"target_boxes: expected float32 \[4, 4\], got torch.float32 \[4, 3\]",
        ),
        ({"target_boxes": torch.zeros(4, 4, dtype=torch.float64)}, "got torch.float64"),
        (
            {"target_boxes": torch.zeros(4, 4, device="meta")},
            "target_boxes: expected the device of ids, cpu, got meta",
        ),
        ({"group_size": 3}, "group_size: expected a positive divisor of the 4 rows, got 3"),
        ({"group_size": 2.0}, "group_size: expected a positive divisor of the 4 rows, got 2.0"),
        ({"group_size": 0}, "group_size: expected a positive divisor of the 4 rows, got 0"),
        ({"which": "best"}, "which: expected one of .*'answer'.*, got 'best'"),
        ({"grammar": "json"}, "grammar: expected one of .*'direct'.*, got 'json'"),
        ({"shape": "diou"}, "shape: expected one of .*'giou'.*, got 'diou'"),
        ({"format_weight": 1.5}, r"in \[0, 1\], got 1.5 and 0.0"),
        ({"vocab_size": 7}, r"table: expected one for a vocabulary of 7 ids, got one for \d+"),
        ({"progress": -0.1}, r"in \[0, 1\], got 0.1 and -0.1"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(change: dict, message: str) -> None:
    integers = {"ids": torch.zeros(4, 3, dtype=torch.int64), "lengths": torch.zeros(4, dtype=torch.int64)}
    arguments = {
        **integers,
        "target_boxes": torch.zeros(4, 4),
        "table": table_of(byte_level()),
        "group_size": 2,
    }
    arguments |= change
    with pytest.raises(ValueError, match=message):
        box_reward(**arguments)  # type: ignore[arg-type]
