"""Answers to held-out cues: whatever the microbatches, each belongs to its cue."""

from __future__ import annotations

import torch

from locus_fast.config import parse
from locus_fast.run.evaluation import evaluate
from locus_fast.run.setup import set_up


def test_answers_are_in_the_order_of_their_cues() -> None:
    """Microbatches are packed by cost, so their cues are out of order; pictures are drawn by a cue's number."""
    one, many = (
        evaluate(set_up(parse(["--eval-cues", "70", "--device", "cpu", "--microbatch-tokens", tokens])), "", lambda: False) for tokens in ("99999", "700")
    )
    assert one is not None
    assert many is not None
    assert one.size_class == many.size_class
    assert torch.equal(one.valid, many.valid)
    torch.testing.assert_close(one.box, many.box)
    torch.testing.assert_close(one.iou, many.iou)


def test_it_ends_when_it_is_told_to() -> None:
    setup = set_up(parse(["--eval-cues", "9", "--device", "cpu"]))
    asked = iter([False] * 9 + [True])
    assert evaluate(setup, "", lambda: next(asked)) is None
