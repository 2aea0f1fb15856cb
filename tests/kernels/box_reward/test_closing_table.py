"""A reply is over exactly when the reader, or a regular expression on its text, finds what it looks for."""

from __future__ import annotations

import re

import pytest
import torch
from locus_kernels.box_reward import CLOSED, START, closing_table

from tests.kernels.box_reward.cases import BOX, byte_level, replies, sentencepiece, table_of


@pytest.mark.parametrize("vocabulary", [byte_level(), sentencepiece()], ids=["byte_level", "sentencepiece"])
@pytest.mark.parametrize(
    ("which", "pattern"), [("first", BOX), ("answer", re.compile(r"<answer>.*?</answer>", re.DOTALL))]
)
def test_agrees_with_the_text(vocabulary, which: str, pattern: re.Pattern) -> None:
    table = closing_table(table_of(vocabulary), which)
    assert table.dtype == torch.int16
    assert table.shape[0] == vocabulary.vocab_size
    assert (table[:, CLOSED] == CLOSED).all()
    closed = 0
    for ids in replies(vocabulary, 3000, seed=1):
        state, ends = START, None
        for place, token in enumerate(ids):
            state = int(table[token, state])
            if state == CLOSED:
                ends = place
                break
        texts = vocabulary.decode([ids[:n] for n in (len(ids), (ends or 0) + 1, ends or 0)])
        assert (ends is not None) == bool(pattern.search(texts[0])), texts[0]
        if ends is not None:
            closed += 1
            assert pattern.search(texts[1]), texts[1]
            assert not pattern.search(texts[2]), texts[2]
    assert 300 < closed < 2900


def test_the_last_box_cannot_end_a_reply() -> None:
    vocabulary = byte_level()
    with pytest.raises(ValueError, match="expected one of first, answer, got 'last'"):
        closing_table(table_of(vocabulary), "last")
