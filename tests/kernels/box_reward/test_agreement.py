"""The box reader against decode-then-regular-expression, on very many sequences."""

from __future__ import annotations

import itertools
import time

import pytest
from locus_kernels.box_reward.automaton import ALPHABET

from tests.kernels.box_reward.cases import VOCABULARIES, assert_agrees, byte_level, replies, table_of


@pytest.mark.long
def test_agrees_with_decode_then_regular_expression_on_100000_sequences() -> None:
    began, counts = (
        time.perf_counter(),
        dict.fromkeys(("first", "last", "answer", "think_answer", "direct"), 0),
    )
    for name, make in VOCABULARIES.items():
        vocabulary = make()
        table = table_of(vocabulary)
        rows = sorted(replies(vocabulary, 50_000, seed=len(name)), key=len)
        for start in range(0, len(rows), 500):
            part = rows[start : start + 500]
            texts = vocabulary.decode(part)
            for which, grammar in (("first", "direct"), ("last", "direct"), ("answer", "think_answer")):
                valid, good = assert_agrees(part, texts, table, which, grammar)
                counts[which] += valid
                counts[grammar] += good
    assert min(counts.values()) > 10_000, f"the generated replies are too one-sided to show much: {counts}"
    print(f"100,000 sequences in {time.perf_counter() - began:.1f} s, {counts}")


CONTEXTS = """
 {} [1,2,3,4{} [1{},2,8,9] {}1,2,8,9] [1,{}2,8,9] [1,2,8,9{}] [1.{}5,2,8,9] <answer>{}
 <think>{}</think><answer>[1,2,8,9]</answer> <think></think>{}<answer>[1,2,8,9]</answer>
 <think></think><answer>[1,2,8,9]</answer>{} {}<think></think><answer>[1,2,8,9]</answer>
 <think></th{}ink><answer></answer> <ans{}wer>[1,2,8,9]</answer> <answer>[1,2,8,9]</an{}swer>
 <answer>[1,2,8,9]</answer{} <{}answer>[1,2,8,9]</answer> <answer>[1,2,8,9]<{}/answer>
 <answer>[1,2,8,9]{}</answer>[4,5,8,9] {}[1,2,8,9]{} <think>a</think><answer{}></think><answer></answer>"""


@pytest.mark.long
def test_agrees_on_all_pairs_of_classes_in_all_surroundings() -> None:
    vocabulary = byte_level()
    symbols = [*ALPHABET, "?"]
    fills = ["", *symbols, *map("".join, itertools.product(symbols, repeat=2))]
    texts = [context.replace("{}", fill) for context in CONTEXTS.split() for fill in fills]
    rows = [[vocabulary.pieces[character][0] for character in text] for text in texts]
    for which, grammar in (("first", "think_answer"), ("last", "direct"), ("answer", "think_answer")):
        assert_agrees(rows, texts, table_of(vocabulary), which, grammar)
