"""The rules of the box reader, one by one."""

from __future__ import annotations

import random

import pytest
import torch
from locus_kernels.box_reward import read_boxes

from tests.kernels.box_reward.cases import Vocabulary, batch, byte_level, sentencepiece, table_of


def read_text(text: str, vocabulary: Vocabulary, **choices: str):
    """Read one text, spelled in random tokens: (box as a list, valid, format_ok)."""
    ids, lengths = batch([vocabulary.spell(text, random.Random(text))])
    reading = read_boxes(ids, lengths, table_of(vocabulary), validate=True, **choices)
    return reading.box[0].tolist(), bool(reading.valid[0]), bool(reading.format_ok[0])


@pytest.mark.parametrize(
    ("text", "which", "box", "valid"),
    [
        ("[10, 20, 30, 40]", "first", [10, 20, 30, 40], True),
        ("see [1,2,3,4] or [5,6,7,8].", "first", [1, 2, 3, 4], True),
        ("see [1,2,3,4] or [5,6,7,8].", "last", [5, 6, 7, 8], True),
        ("[1,2,3,4]<answer>a [5,6,7,8] [6,6,9,9]</answer>", "answer", [5, 6, 7, 8], True),
        ("<answer>[5,6,7,8]", "answer", [0] * 4, False),
        ("<answer></answer>[5,6,7,8]", "answer", [0] * 4, False),
        ("<answer></answer><answer>[5,6,7,8]</answer>", "answer", [0] * 4, False),
        ("</answer><answer>[5,6,7,8]</answer>", "answer", [5, 6, 7, 8], True),
        ("<answer><answer>[5,6,7,8]</answer></answer>", "answer", [5, 6, 7, 8], True),
        ("[5,6<answer>,7,8]</answer>", "answer", [0] * 4, False),
        ("[[1,2,3,4]]", "first", [1, 2, 3, 4], True),
        ("[0,[1,2,3,4]", "first", [1, 2, 3, 4], True),
        ("[1,2,3]", "first", [0] * 4, False),
        ("[1,2,3,4,5]", "first", [0] * 4, False),
        ("[1,2,3,4", "first", [0] * 4, False),
        ("[1,,3,4]", "first", [0] * 4, False),
        ("[1 2,3,4,5]", "first", [0] * 4, False),
        ("[1.,2,3,4]", "first", [0] * 4, False),
        ("[.5,2,3,4]", "first", [0] * 4, False),
        ("[1.5.2,2,3,4]", "first", [0] * 4, False),
        ("[+-1,2,3,4]", "first", [0] * 4, False),
        ("[- 1,2,3,4]", "first", [0] * 4, False),
        ("[ \t\n\r\f\v-1.50 ,\n+2 , 3,0004 ]", "first", [-1.5, 2, 3, 4], True),
        ("[1,2,3,4\x1c]", "first", [0] * 4, False),
        ("[9,2,3,4]", "first", [9, 2, 3, 4], False),
        ("[3,2,3,4]", "first", [3, 2, 3, 4], False),
        ("[1,4,3,4]", "first", [1, 4, 3, 4], False),
        ("[-1000000,0,1000000,1]", "first", [-1e6, 0, 1e6, 1], True),
        ("[0,0,1000000.0000009,1]", "first", [0, 0, 1e6, 1], True),
        ("[0,0,1000000.000001,1]", "first", [0] * 4, False),
        ("[0,0,10000000,1]", "first", [0] * 4, False),
        ("[-1000001,0,1,1]", "first", [0] * 4, False),
        ("[0,0,1,99999999999999999999999999999999]", "first", [0] * 4, False),
        ("[0,0,1,00000000000000000000000000000099]", "first", [0, 0, 1, 99], True),
        ("[0,0,1,99999999999999999999] [1,2,3,4]", "first", [0] * 4, False),
        ("[0.1234567,0.999999999,1,1]", "first", [0.123456, 0.999999, 1, 1], True),
        ("[0.0000001,0,0.0000009,1]", "first", [0, 0, 0, 1], False),
        ("[999999.1,0,999999.11,1]", "first", [999999.125, 0, 999999.125, 1], False),
        ("", "first", [0] * 4, False),
    ],
)
def test_box_rules(text: str, which: str, box: list[float], valid: bool, vocabulary: Vocabulary) -> None:
    got, got_valid, _ = read_text(text, vocabulary, which=which)
    assert got == torch.tensor(box, dtype=torch.float32).tolist()
    assert got_valid is valid


@pytest.mark.parametrize(
    ("text", "grammar", "expected"),
    [
        ("<think>a</think><answer>b</answer>", "think_answer", True),
        ("<think></think><answer></answer>", "think_answer", True),
        (" \n<think>a</think> \t\r\n<answer>b</answer>\f\v", "think_answer", True),
        ("<think>a</think>b</think><answer></answer>", "think_answer", True),
        ("<think></think>x</think> <answer></answer>x</answer>", "think_answer", True),
        ("<think>a</think>.<answer>b</answer>", "think_answer", False),
        ("<think>a</think><answer>b</answer>.", "think_answer", False),
        (".<think>a</think><answer>b</answer>", "think_answer", False),
        ("<think>a<answer>b</answer>", "think_answer", False),
        ("<think>a</think><answer>b", "think_answer", False),
        ("<<think>a</think><answer>b</answer>", "think_answer", False),
        ("<think>a</think><<answer>b</answer>", "think_answer", False),
        ("<think>a</think>< answer>b</answer>", "think_answer", False),
        ("<think>a</think><answer>b</answer><answer>", "think_answer", False),
        ("[1,2,3,4]", "think_answer", False),
        ("", "think_answer", False),
        ("[1,2,3,4]", "direct", True),
        (" \n[ 4 , 3, 2,9999999999 ]\n ", "direct", True),
        ("[1,2,3,4].", "direct", False),
        ("a[1,2,3,4]", "direct", False),
        ("[[1,2,3,4]", "direct", False),
        ("[1,2,3,4][1,2,3,4]", "direct", False),
        ("[1,2,3]", "direct", False),
        ("[1,2,3,4", "direct", False),
        (" ", "direct", False),
        ("", "direct", False),
    ],
)
def test_format_rules(text: str, grammar: str, expected: bool, vocabulary: Vocabulary) -> None:
    assert read_text(text, vocabulary, grammar=grammar)[2] is expected


def test_special_tokens_are_silent_and_other_added_tokens_speak() -> None:
    vocabulary = byte_level()
    box = vocabulary.spell("[1,2,3,4]", random.Random(0))
    special, think, close, with_spaces = (
        vocabulary.tokenizer.get_vocab()[t] for t in ("<|im_start|>", "<think>", "</think>", "[ 1, 2 ,3,4 ]")
    )
    spare, tags = vocabulary.vocab_size - 1, vocabulary.spell("</think>", random.Random(0))
    rows = [
        [box[0], special, spare, *box[1:], special],
        [special, *box],
        [think, *box],
        [with_spaces],
        [think, close],
        [think, *tags],
    ]
    table = table_of(vocabulary)
    reading = read_boxes(*batch(rows), table, which="first", grammar="direct")
    assert reading.valid.tolist() == [True, True, True, True, False, False]
    assert reading.format_ok.tolist() == [True, True, False, True, False, False]
    assert int(table.offsets[special + 1] - table.offsets[special]) == 0


def test_byte_fallback_tokens_count_as_their_bytes() -> None:
    vocabulary = sentencepiece()
    byte = [vocabulary.tokenizer.get_vocab()[f"<0x{b:02X}>"] for b in range(256)]
    rows = [
        [byte[b] for b in text]
        for text in (b"[1,2,\n3,4]", "é[1,2,3,4]".encode(), b"\xe9[1,2,3,4]\xf0\x9f", b"[1,2,3\xc3,4]")
    ]
    reading = read_boxes(*batch(rows), table_of(vocabulary), which="first", grammar="direct")
    assert reading.valid.tolist() == [True, True, True, False]
    assert reading.format_ok.tolist() == [True, False, False, False]


# ------------------------------------------------------------------------------------------------------ table
