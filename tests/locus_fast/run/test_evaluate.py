"""Answers to held-out cues: whatever the microbatches, each belongs to its cue."""

from __future__ import annotations

from collections.abc import Callable

import torch

from locus_fast.config import parse
from locus_fast.run.evaluation import Evaluation
from locus_fast.run.setup import set_up


def answers(options: list[str], stop: Callable[[], bool]) -> Evaluation | None:
    setup = set_up(parse(["--device", "cpu", *options]))
    return setup.evaluate("", stop)


def test_answers_are_in_the_order_of_their_cues() -> None:
    """Microbatches are packed by cost, so their cues are out of order; pictures are drawn by a cue's
    number."""
    one, many = (
        answers(["--eval-cues", "70", "--microbatch-tokens", tokens], lambda: False)
        for tokens in ("99999", "700")
    )
    assert one is not None
    assert many is not None
    assert one.size_class == many.size_class
    assert torch.equal(one.valid, many.valid)
    torch.testing.assert_close(one.box, many.box)
    torch.testing.assert_close(one.iou, many.iou)


def test_it_ends_when_it_is_told_to() -> None:
    asked = iter([False] * 9 + [True])
    assert answers(["--eval-cues", "9"], lambda: next(asked)) is None
