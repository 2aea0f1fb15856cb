"""What the box-reward tests share: two tokenizers built on the spot, replies generated to be hard, and the
oracle.

The oracle decodes the tokens and applies Python's regular expressions to the text."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

import numpy as np
import torch
from locus_kernels.box_reward import TokenTable, build_token_table, read_boxes
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

# ----------------------------------------------------------------------------------------------------- oracle
NUMBER = r"[+-]?[0-9]+(?:\.[0-9]+)?"
BOX = re.compile(r"\[" + ",".join([rf"\s*({NUMBER})\s*"] * 4) + r"\]", re.ASCII)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FORMATS = {
    "think_answer": re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.ASCII | re.DOTALL),
    "direct": re.compile(rf"\s*{BOX.pattern}\s*", re.ASCII),
}


def coordinate(number: str) -> np.float32 | None:
    """The float32 that a matched number stands for: cut after six fraction digits; None beyond a million."""
    whole, _, fraction = number.partition(".")
    cut = f"{whole}.{fraction[:6]}"
    return None if abs(Decimal(cut)) > 1_000_000 else np.float32(float(cut))


def oracle_box(text: str, which: str) -> tuple[list[np.float32], bool]:
    """(box, valid) that a text says; zeros and False where it says none."""
    if which == "answer":
        answer = ANSWER.search(text)
        text, which = (answer.group(1) if answer else ""), "first"
    boxes = list(BOX.finditer(text))
    said = [coordinate(n) for n in boxes[0 if which == "first" else -1].groups()] if boxes else []
    box = [number for number in said if number is not None]
    if len(box) < 4:
        return [np.float32(0)] * 4, False
    return box, bool(box[2] > box[0] and box[3] > box[1])


def oracle_format(text: str, grammar: str) -> bool:
    """Whether the whole text follows the grammar."""
    return FORMATS[grammar].fullmatch(text) is not None


# ------------------------------------------------------------------------------------------------- tokenizers
@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, the rows of the embedding that goes with it, and its tokens by their ASCII text."""

    tokenizer: PreTrainedTokenizerFast
    vocab_size: int
    pieces: dict[str, list[int]]
    noise: list[int]  # ids to throw in anywhere

    def decode(self, rows: list[list[int]]) -> list[str]:
        """The texts of many replies."""
        return self.tokenizer.backend_tokenizer.decode_batch(rows, skip_special_tokens=True)

    def spell(self, text: str, random_: random.Random) -> list[int]:
        """Some way of writing an ASCII text in tokens, at random among all."""
        ids, at = [], 0
        while at < len(text):
            piece = text[
                at : at
                + random_.choice(
                    [n for n in range(1, 10) if at + n <= len(text) and text[at : at + n] in self.pieces]
                )
            ]
            ids.append(random_.choice(self.pieces[piece]))
            at += len(piece)
        return ids


def _by_text(texts: dict[int, str]) -> dict[str, list[int]]:
    pieces: dict[str, list[int]] = {}
    for token, text in texts.items():
        if text.isascii() and text:
            pieces.setdefault(text, []).append(token)
    return pieces


BYTE_LEVEL_WORDS = """
 ], ][ [[ ]] [" "] ," .. ... -- </ <th ink> think answer answer> thin swer er> >< ></ "," {" "} [- ,- the an
 ans ,, :// // [] ]. /> Ã© </answer ><answer ]</ the. Ġ[ ,Ġ ĠĠ Ġ- ĠĠĠĠ ĊĊ ĠĊ Ġthe >Ċ ]Ċ Ġ< čĊ ĊĊĊĊ ĠĠĠĠĠĠĠĠ
 -------- ........ //////// ,,,, [[[[ ]]]] >>>>"""


@lru_cache(maxsize=1)
def byte_level() -> Vocabulary:
    """Byte-level BPE in the manner of Qwen: single digits, parts of UTF-8 characters, chat tokens, "<think>"
    as an added token, spare rows."""
    vocab = {
        symbol: n
        for n, symbol in enumerate(dict.fromkeys([*sorted(ByteLevel.alphabet()), *BYTE_LEVEL_WORDS.split()]))
    }
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [
            AddedToken(t, special=True)
            for t in ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|box_start|>", "<answer-hint>")
        ]
    )
    core.add_tokens(
        [AddedToken(t, special=False) for t in ("<think>", "</think>", "<tool_call>", "[ 1, 2 ,3,4 ]")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    texts = {n: core.decode([n], skip_special_tokens=True) for n in range(core.get_vocab_size())}
    return Vocabulary(tokenizer, len(tokenizer) + 5, _by_text(texts), list(range(len(tokenizer) + 5)))


SENTENCEPIECE_WORDS = """
 ], [" "] ,▁ ▁[ ▁< ▁, ▁] ▁▁ ▁▁▁▁ [[ ]] </ answer> <answer> think> <think> </think> </answer> 1. .5 0.5 [1 1]
 2,3 ,4] -1 +2 ▁7 [0, 000000 1000000 9999999 </th ▁the an sw ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁ [10,20,30,40] ]</answer> é --
 .. // ><"""


@lru_cache(maxsize=1)
def sentencepiece() -> Vocabulary:
    """SentencePiece-like BPE: the word mark for a space, byte fallback, digits in groups of up to three, tags
    and parts of boxes as single tokens.

    Bytes past ASCII come in whole characters here, as a decoder turns every byte of a run that is not valid
    UTF-8 into U+FFFD, ASCII ones too.
    """
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *map(chr, range(33, 127))]
    symbols += [f"{n:0{w}d}" for w in (2, 3) for n in range(10**w)] + SENTENCEPIECE_WORDS.split()
    vocab = {symbol: n for n, symbol in enumerate(dict.fromkeys(symbols))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    texts = {
        n: core.decode([vocab["a"], n], skip_special_tokens=True)[1:] for n in range(core.get_vocab_size())
    }
    noise = [n for n in range(len(tokenizer) + 3) if not vocab["<0x80>"] <= n <= vocab["<0xFF>"]]
    return Vocabulary(tokenizer, len(tokenizer) + 3, _by_text(texts), noise)


VOCABULARIES = {"byte_level": byte_level, "sentencepiece": sentencepiece}


# ---------------------------------------------------------------------------------------------------- replies
ODD_NUMBERS = """
 1000000 1000000.0 1000000.0000009 1000000.000001 1000001 -1000000.5 9999999 10000000 00000000000000000007
 999999.9999999 123456789012345678901234567890 1. .5 1.2.3 +-3 -+3 1e3 - + . 0 -0 +0.0 007 0.0000004
 0.00000049 5.1234567 16777217 0x10"""
SPACES = ["", "", "", "", " ", " ", "  ", "\n", "\t \r\n", "\f\v", "\x1c"]
SCRAP_WORDS = """
 < > / [ ] , . - + 1 23 <think> </think> <answer> </answer> <answer </answer ></answer> think> <<answer>
 <Answer> [[ ]] [1,2,3,4] [1,2,3] [5,6,7,8,9] [1,2,3,4 1,2,3,4] see the box: "bbox_2d": {}
 </think></think><answer> <answer></answer> <think><answer>"""
SCRAPS = [*SCRAP_WORDS.split(), " ", "\n", ", ", "] [", "</ answer>", "< answer>"]


def _number(random_: random.Random, least: int, scale: int) -> str:
    if random_.random() < 0.05:
        return random_.choice(ODD_NUMBERS.split())
    sign = random_.choice(["", "", "", "", "+", "-"]) if least == 0 else ""
    fraction = f".{random_.randrange(10 ** random_.randrange(1, 9))}" if random_.random() < 0.2 else ""
    return sign + str(random_.randrange(least, least + scale)) + fraction


def _box(random_: random.Random) -> str:
    count, scale = random_.choice([4] * 20 + [3, 5]), random_.choice([10, 100, 1000, 100000])
    numbers = [_number(random_, 0 if k < 2 else scale * 3 // 4, scale) for k in range(count)]
    padded = [random_.choice(SPACES[:-1]) + n + random_.choice(SPACES[:-1]) for n in numbers]
    return "[" + ",".join(padded) + ("]" if random_.random() < 0.97 else "")


def _prose(random_: random.Random) -> str:
    return "".join(random_.choice(SCRAPS) for _ in range(random_.randrange(3)))


def reply_text(random_: random.Random) -> str:
    """A reply: mostly well formed, about one in three with a character or a scrap changed somewhere."""

    def space() -> str:
        return random_.choice(SPACES)

    kind = random_.randrange(4)
    if kind == 0:
        text = space() + _box(random_) + space()
    elif kind == 1:
        text = _prose(random_) + _box(random_) + _prose(random_) + _box(random_) + _prose(random_)
    else:
        answer = (
            _prose(random_) * random_.randrange(2) + _box(random_) + _prose(random_) * random_.randrange(2)
        )
        text = f"{space()}<think>{_prose(random_)}</think>{space()}<answer>{answer}</answer>{space()}"
    while random_.random() < 0.2:
        at = random_.randrange(len(text) + 1)
        text = text[:at] + random_.choice(["", *SCRAPS]) + text[at + random_.randrange(3) :]
    return text


def mutate(ids: list[int], noise: list[int], random_: random.Random) -> list[int]:
    """Tokens dropped, doubled, swapped, replaced, inserted, or cut off at an end."""
    for _ in range(random_.choice([0, 1, 1, 2, 3])):
        at = random_.randrange(len(ids) + 1)
        before, after = ids[:at], ids[at:]
        stranger = random_.choice(noise)
        changed = [
            [*before, *after[1:]],
            [*before, stranger, *after],
            [*before, stranger, *after[1:]],
            [*before, *after[:3], *after],
            [*before, *after[1::-1], *after[2:]],
            random_.choice([before, after]),
        ]
        ids = random_.choice(changed)
    return ids


def replies(vocabulary: Vocabulary, count: int, seed: int) -> list[list[int]]:
    """`count` token sequences: replies, each also in changed forms, and one in twenty pure noise."""
    random_ = random.Random(seed)
    rows: list[list[int]] = []
    while len(rows) < count:
        if random_.random() < 0.2:
            rows.append([random_.choice(vocabulary.noise) for _ in range(random_.randrange(24))])
        ids = vocabulary.spell(reply_text(random_), random_)
        rows += [ids, *(mutate(ids, vocabulary.noise, random_) for _ in range(3))]
    return rows[:count]


# ---------------------------------------------------------------------------------------------------- tensors
def table_of(vocabulary: Vocabulary, device: str = "cpu") -> TokenTable:
    return build_token_table(vocabulary.tokenizer, vocabulary.vocab_size).to(device)


def padded(
    rows: list[list[int]], garbage: list[int], dtype: torch.dtype = torch.int64
) -> tuple[Tensor, Tensor]:
    """ids [R, L] and lengths [R]; past a row's length lies garbage, in turn, to show that nobody looks at
    it."""
    width = max(map(len, rows), default=0)
    tails = [[garbage[k % len(garbage)] for k in range(width - len(row))] for row in rows]
    ids = torch.tensor([row + tail for row, tail in zip(rows, tails, strict=True)], dtype=dtype)
    return ids.reshape(len(rows), width), torch.tensor([len(row) for row in rows], dtype=dtype)


def batch(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """ids [R, L] and lengths [R], on the CPU."""
    return padded(rows, garbage=[-100, 10**12, 5, -1])


def assert_agrees(
    rows: list[list[int]], texts: list[str], table, which: str, grammar: str
) -> tuple[int, int]:
    """Reading `rows` gives exactly what the oracle finds in `texts`; returns how many were valid and how many
    well formed."""
    reading = read_boxes(*batch(rows), table, which=which, grammar=grammar)
    expected = [oracle_box(text, which) for text in texts]
    boxes = np.array([box for box, _ in expected], dtype=np.float32).reshape(-1, 4)
    valid = np.array([v for _, v in expected], dtype=bool)
    good = np.array([oracle_format(text, grammar) for text in texts], dtype=bool)
    for name, got, want in (
        ("box", reading.box, boxes),
        ("valid", reading.valid, valid),
        ("format_ok", reading.format_ok, good),
    ):
        wrong = np.flatnonzero((got.numpy() != want).reshape(len(rows), -1).any(1))
        if len(wrong):
            first = wrong[0]
            said = f"{name} ({which}, {grammar}): {texts[first]!r} of {rows[first]}"
            raise AssertionError(f"{said}: got {got[first]}, expected {want[first]}")
    return int(valid.sum()), int(good.sum())
