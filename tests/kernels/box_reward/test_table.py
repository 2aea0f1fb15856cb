"""The table of tokens: its layout, and that shortening a token changes no reading."""

from __future__ import annotations

import dataclasses
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from locus_kernels.box_reward import build_token_table, read_boxes
from locus_kernels.box_reward.automaton import ALPHABET, CLASS_OF_BYTE, OTHER, automaton
from locus_kernels.box_reward.table import TokenTable, shorten
from torch import Tensor

from tests.kernels.box_reward.cases import Vocabulary, batch, byte_level, table_of


def test_table_layout(vocabulary: Vocabulary) -> None:
    table, again = table_of(vocabulary), table_of(vocabulary)
    assert table.offsets.dtype == torch.int32
    assert table.classes.dtype == torch.uint8
    assert table.offsets.shape == (vocabulary.vocab_size + 1,)
    assert table.vocab_size == vocabulary.vocab_size
    assert int(table.offsets[-1]) == table.classes.shape[0]
    assert table.width == int(table.offsets.diff().max())
    for field in dataclasses.fields(table):
        a, b = getattr(table, field.name), getattr(again, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert table.to("meta").offsets.device.type == "meta"


def test_long_dull_tokens_become_short() -> None:
    vocabulary = byte_level()
    table = table_of(vocabulary)
    lengths = {
        token: int(table.offsets[i + 1] - table.offsets[i])
        for token, i in vocabulary.tokenizer.get_vocab().items()
    }
    expected = {"-" * 8: 1, "Ġ" * 8: 1, "/" * 8: 1, "[" * 4: 2, "]" * 4: 2, ">" * 4: 2}
    expected |= {"Ġthe": 1, "answer": 6, "</think>": 8, "<|im_end|>": 0}
    assert {token: lengths[token] for token in expected} == expected


def test_table_errors() -> None:
    with pytest.raises(ValueError, match="vocab_size >= 1, got 0"):
        build_token_table(byte_level().tokenizer, 0)
    with pytest.raises(ValueError, match="fast Hugging Face tokenizer"):
        build_token_table(object(), 10)
    backend = SimpleNamespace(
        decode=lambda ids, **_: "a" if len(ids) == 1 else "b",
        decode_batch=lambda rows, **_: ["zz" for _ in rows],
    )
    with pytest.raises(ValueError, match="token by token"):
        build_token_table(SimpleNamespace(get_vocab=lambda: {"a": 0}, backend_tokenizer=backend), 2)
    with pytest.raises(ValueError, match="at least one printable ASCII character"):
        build_token_table(SimpleNamespace(get_vocab=lambda: {"word": 0}, backend_tokenizer=backend), 2)


# ------------------------------------------------------------------------------------------- edges and errors


# ------------------------------------------------------------------------------------------- shorter strings
def test_shortened_tokens_read_like_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewriting of a token's classes is invisible: random strings as tokens, shortened and not, in random
    company."""
    random_ = random.Random(1)
    symbols = list(range(OTHER + 1))
    likely = [ALPHABET.index(c) for c in "[],.-1 <>/"] + [OTHER]
    parts = [
        bytes(
            random_.choice(likely if random_.random() < 0.7 else symbols)
            for _ in range(random_.randrange(1, 8))
        )
        for _ in range(20_000)
    ]
    tags = ["<think>", "</think>", "<answer>", "</answer>", "[1,2,3", ",4]", "[10,20,30,40]", " "]
    parts += [text.encode().translate(CLASS_OF_BYTE) for text in tags] * 500
    short = [shorten(part) for part in parts]
    assert sum(map(len, short)) < 0.7 * sum(map(len, parts))
    rows = [[random_.randrange(len(parts)) for _ in range(random_.randrange(8))] for _ in range(1000)]
    rows += [
        [random_.choice([random_.randrange(len(parts)), *range(20_000, 20_008)]) for _ in range(8)]
        for _ in range(1000)
    ]
    whole_table, short_table = (_table_of_strings(strings) for strings in (parts, short))
    for which, grammar in itertools.product(("first", "last", "answer"), ("think_answer", "direct")):
        whole, shortened = (
            read_boxes(*batch(rows), table, which=which, grammar=grammar)
            for table in (whole_table, short_table)
        )
        for a, b in zip(whole, shortened, strict=True):
            assert torch.equal(a, b)


def _table_of_strings(strings: list[bytes]):
    machine = automaton()
    offsets = torch.tensor([0, *map(len, strings)]).cumsum(0).int()
    classes = torch.frombuffer(bytearray(b"".join(strings)), dtype=torch.uint8)
    return TokenTable(offsets, classes, machine.transitions, machine.final, width=max(map(len, strings)))
