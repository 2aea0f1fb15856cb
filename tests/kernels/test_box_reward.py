"""The box reader against decode-then-regular-expression, and the reward's arithmetic against hand values and float64."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from locus_kernels.box_reward import REWARD_SHAPES, box_reward, build_token_table, read_boxes
from locus_kernels.box_reward import table as table_module
from torch import Tensor

from tests.kernels.box_reward_cases import (
    Vocabulary,
    byte_level,
    oracle_box,
    oracle_format,
    replies,
    sentencepiece,
)

VOCABULARIES = {"byte_level": byte_level, "sentencepiece": sentencepiece}


@pytest.fixture(params=VOCABULARIES)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return VOCABULARIES[request.param]()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """ids [R, L] and lengths [R]; what lies past a row's length is garbage, to show that nobody looks at it."""
    width = max(map(len, rows), default=0)
    garbage = [-100, 10**12, 5, -1]
    ids = torch.tensor([row + [garbage[k % 4] for k in range(width - len(row))] for row in rows], dtype=torch.int64).reshape(len(rows), width)
    return ids, torch.tensor([len(row) for row in rows], dtype=torch.int64)


def table_of(vocabulary: Vocabulary):
    return build_token_table(vocabulary.tokenizer, vocabulary.vocab_size)


def read_text(text: str, vocabulary: Vocabulary, **choices: str):
    """Read one text, spelled in random tokens: (box as a list, valid, format_ok)."""
    ids, lengths = batch([vocabulary.spell(text, random.Random(text))])
    reading = read_boxes(ids, lengths, table_of(vocabulary), validate=True, **choices)
    return reading.box[0].tolist(), bool(reading.valid[0]), bool(reading.format_ok[0])


def assert_agrees(rows: list[list[int]], texts: list[str], table, which: str, grammar: str) -> tuple[int, int]:
    """Reading `rows` gives exactly what the oracle finds in `texts`; returns how many were valid and how many well formed."""
    reading = read_boxes(*batch(rows), table, which=which, grammar=grammar)
    expected = [oracle_box(text, which) for text in texts]
    boxes = np.array([box for box, _ in expected], dtype=np.float32).reshape(-1, 4)
    valid = np.array([v for _, v in expected], dtype=bool)
    good = np.array([oracle_format(text, grammar) for text in texts], dtype=bool)
    for name, got, want in (("box", reading.box, boxes), ("valid", reading.valid, valid), ("format_ok", reading.format_ok, good)):
        wrong = np.flatnonzero((got.numpy() != want).reshape(len(rows), -1).any(1))
        assert not len(wrong), f"{name} ({which}, {grammar}): {texts[wrong[0]]!r} of {rows[wrong[0]]}: got {got[wrong[0]]}, expected {want[wrong[0]]}"
    return int(valid.sum()), int(good.sum())


# -------------------------------------------------------------------------------------------- agreement with text and regular expressions
def test_agrees_with_decode_then_regular_expression_on_100000_sequences() -> None:
    began, counts = time.perf_counter(), dict.fromkeys(("first", "last", "answer", "think_answer", "direct"), 0)
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
 {} [1,2,3,4{} [1{},2,8,9] {}1,2,8,9] [1,{}2,8,9] [1,2,8,9{}] [1.{}5,2,8,9] <answer>{} <think>{}</think><answer>[1,2,8,9]</answer>
 <think></think>{}<answer>[1,2,8,9]</answer> <think></think><answer>[1,2,8,9]</answer>{} {}<think></think><answer>[1,2,8,9]</answer>
 <think></th{}ink><answer></answer> <ans{}wer>[1,2,8,9]</answer> <answer>[1,2,8,9]</an{}swer> <answer>[1,2,8,9]</answer{} <{}answer>[1,2,8,9]</answer>
 <answer>[1,2,8,9]<{}/answer> <answer>[1,2,8,9]{}</answer>[4,5,8,9] {}[1,2,8,9]{} <think>a</think><answer{}></think><answer></answer>"""


def test_agrees_on_all_pairs_of_classes_in_all_surroundings() -> None:
    vocabulary = byte_level()
    symbols = [*table_module.ALPHABET, "?"]
    fills = ["", *symbols, *map("".join, itertools.product(symbols, repeat=2))]
    texts = [context.replace("{}", fill) for context in CONTEXTS.split() for fill in fills]
    rows = [[vocabulary.pieces[character][0] for character in text] for text in texts]
    for which, grammar in (("first", "think_answer"), ("last", "direct"), ("answer", "think_answer")):
        assert_agrees(rows, texts, table_of(vocabulary), which, grammar)


def test_shortened_tokens_read_like_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewriting of a token's classes is invisible: random strings as tokens, shortened and not, in random company."""
    random_ = random.Random(1)
    symbols = list(range(table_module.OTHER + 1))
    likely = [table_module.ALPHABET.index(c) for c in "[],.-1 <>/"] + [table_module.OTHER]
    parts = [bytes(random_.choice(likely if random_.random() < 0.7 else symbols) for _ in range(random_.randrange(1, 8))) for _ in range(20_000)]
    tags = ["<think>", "</think>", "<answer>", "</answer>", "[1,2,3", ",4]", "[10,20,30,40]", " "]
    parts += [text.encode().translate(table_module.CLASS_OF_BYTE) for text in tags] * 500
    short = [table_module.shorten(part) for part in parts]
    assert sum(map(len, short)) < 0.7 * sum(map(len, parts))
    rows = [[random_.randrange(len(parts)) for _ in range(random_.randrange(8))] for _ in range(1000)]
    rows += [[random_.choice([random_.randrange(len(parts)), *range(20_000, 20_008)]) for _ in range(8)] for _ in range(1000)]
    whole_table, short_table = (_table_of_strings(strings) for strings in (parts, short))
    for which, grammar in itertools.product(("first", "last", "answer"), ("think_answer", "direct")):
        whole, shortened = (read_boxes(*batch(rows), table, which=which, grammar=grammar) for table in (whole_table, short_table))
        for a, b in zip(whole, shortened, strict=True):
            assert torch.equal(a, b)


def _table_of_strings(strings: list[bytes]):
    machine = table_module.automaton()
    offsets = torch.tensor([0, *map(len, strings)]).cumsum(0).int()
    classes = torch.frombuffer(bytearray(b"".join(strings)), dtype=torch.uint8)
    return table_module.TokenTable(offsets, classes, machine.transitions, machine.final, width=max(map(len, strings)))


# ---------------------------------------------------------------------------------------------------------------- rules, one by one
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
    special, think, close, with_spaces = (vocabulary.tokenizer.get_vocab()[t] for t in ("<|im_start|>", "<think>", "</think>", "[ 1, 2 ,3,4 ]"))
    spare, tags = vocabulary.vocab_size - 1, vocabulary.spell("</think>", random.Random(0))
    rows = [[box[0], special, spare, *box[1:], special], [special, *box], [think, *box], [with_spaces], [think, close], [think, *tags]]
    table = table_of(vocabulary)
    reading = read_boxes(*batch(rows), table, which="first", grammar="direct")
    assert reading.valid.tolist() == [True, True, True, True, False, False]
    assert reading.format_ok.tolist() == [True, True, False, True, False, False]
    assert int(table.offsets[special + 1] - table.offsets[special]) == 0


def test_byte_fallback_tokens_count_as_their_bytes() -> None:
    vocabulary = sentencepiece()
    byte = [vocabulary.tokenizer.get_vocab()[f"<0x{b:02X}>"] for b in range(256)]
    rows = [[byte[b] for b in text] for text in (b"[1,2,\n3,4]", "é[1,2,3,4]".encode(), b"\xe9[1,2,3,4]\xf0\x9f", b"[1,2,3\xc3,4]")]
    reading = read_boxes(*batch(rows), table_of(vocabulary), which="first", grammar="direct")
    assert reading.valid.tolist() == [True, True, True, False]
    assert reading.format_ok.tolist() == [True, False, False, False]


# ------------------------------------------------------------------------------------------------------------------- table
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
    lengths = {token: int(table.offsets[i + 1] - table.offsets[i]) for token, i in vocabulary.tokenizer.get_vocab().items()}
    assert [lengths[t] for t in ("-" * 8, "Ġ" * 8, "/" * 8, "[" * 4, "]" * 4, ">" * 4, "Ġthe", "answer", "</think>", "<|im_end|>")] == [
        1, 1, 1, 2, 2, 2, 1, 6, 8, 0,
    ]  # fmt: skip


def test_table_errors() -> None:
    with pytest.raises(ValueError, match="vocab_size >= 1, got 0"):
        build_token_table(byte_level().tokenizer, 0)
    with pytest.raises(ValueError, match="fast Hugging Face tokenizer"):
        build_token_table(object(), 10)
    backend = SimpleNamespace(decode=lambda ids, **_: "a" if len(ids) == 1 else "b", decode_batch=lambda rows, **_: ["zz" for _ in rows])
    with pytest.raises(ValueError, match="token by token"):
        build_token_table(SimpleNamespace(get_vocab=lambda: {"a": 0}, backend_tokenizer=backend), 2)
    with pytest.raises(ValueError, match="at least one printable ASCII character"):
        build_token_table(SimpleNamespace(get_vocab=lambda: {"word": 0}, backend_tokenizer=backend), 2)


# -------------------------------------------------------------------------------------------------------- edges and errors
def test_ids_outside_the_vocabulary_fit_nowhere_and_lengths_are_bounded() -> None:
    vocabulary = byte_level()
    table, box = table_of(vocabulary), vocabulary.spell("[1,2,3,4]", random.Random(0))
    for wrong in (-1, -(2**40), vocabulary.vocab_size, 2**40, 2**32 + box[1]):
        rows = [[wrong, *box], [*box[:3], wrong, *box[3:]], [*box, wrong]]
        reading = read_boxes(*batch(rows), table, which="first", grammar="direct")
        assert reading.valid.tolist() == [True, False, True]
        assert not reading.format_ok.any()
        with pytest.raises(ValueError, match=rf"ids: expected values in \[0, {vocabulary.vocab_size}\), got \[{wrong}\]"):
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
        for a, b in zip(cut, read_boxes(*batch(prefixes), table_of(vocabulary), which=which, grammar=grammar), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_empty_batches_strides_and_integer_types(dtype: torch.dtype) -> None:
    table = table_of(byte_level())
    for rows, tokens in ((0, 0), (0, 5), (3, 0)):
        earned = box_reward(torch.zeros(rows, tokens, dtype=dtype), torch.full((rows,), 9, dtype=dtype), table, torch.zeros(rows, 4), 3)
        assert [list(t.shape) for t in earned] == [[rows, 4], [rows], [rows], [rows], [rows], [rows], [rows // 3]]
        assert not earned.valid.any()
        assert not earned.reward.any()
    ids, lengths = batch([byte_level().spell("[1,2,3,4]", random.Random(0))] * 2)
    turned = ids.to(dtype).t().contiguous().t()
    assert read_boxes(turned, lengths.to(dtype), table, which="first", validate=True).valid.all()


def test_nothing_is_read_back_from_the_device() -> None:
    """Tensors without data have nothing to give to the host: any copy to it raises."""
    table = table_of(byte_level()).to("meta")
    ids, lengths = torch.empty(8, 6, dtype=torch.int32, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    for shape, which in itertools.product(REWARD_SHAPES, ("first", "last", "answer")):
        earned = box_reward(ids, lengths, table, torch.empty(8, 4, device="meta"), 4, shape=shape, which=which)
        assert earned.advantage.shape == (8,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(4, 3)}, "ids: expected an integer tensor, got torch.float32"),
        ({"ids": torch.zeros(4, 3, dtype=torch.bool)}, "ids: expected an integer tensor, got torch.bool"),
        ({"lengths": torch.zeros(4)}, "lengths: expected an integer tensor, got torch.float32"),
        ({"lengths": torch.zeros(4, dtype=torch.int64, device="meta")}, "lengths: expected the token table's device cpu, got meta"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"got \[4, 3\] and \[3\]"),
        ({"ids": torch.zeros(4, dtype=torch.int64)}, r"expected ids \[rows, tokens\]"),
        ({"target_boxes": torch.zeros(4, 3)}, r"target_boxes: expected float32 \[4, 4\], got torch.float32 \[4, 3\]"),
        ({"target_boxes": torch.zeros(4, 4, dtype=torch.float64)}, "got torch.float64"),
        ({"target_boxes": torch.zeros(4, 4, device="meta")}, "target_boxes: expected the device of ids, cpu, got meta"),
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
    arguments = {**integers, "target_boxes": torch.zeros(4, 4), "table": table_of(byte_level()), "group_size": 2}
    arguments |= change
    with pytest.raises(ValueError, match=message):
        box_reward(**arguments)  # type: ignore[arg-type]
