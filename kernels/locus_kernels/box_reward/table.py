"""What a reply's tokens mean to the box reader: a table of every token's character classes, built once.

Tokens are shortened where that changes no reading: `automaton.py` says what classes are and who reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from locus_kernels.box_reward.automaton import (
    ACTION_SHIFT,
    CLASS_COUNT,
    CLASS_OF_BYTE,
    CLOSE,
    DIGIT,
    FRACTION,
    OPEN,
    OTHER,
    PADDING,
    STATE_MASK,
    automaton,
)


# -------------------------------------------------------------------------------------------- shorter strings
def _effect(classes: tuple[int, ...]) -> tuple[int, ...]:
    """All that a string of one or two classes does, from every state: the state it leads to and the actions
    that still matter.

    An action matters if it completes a box, or if the box that it belongs to is complete or still open at the
    end; what was read of an abandoned box has no influence on anything. Strings of equal effect can stand for
    each other inside any reply.
    """
    machine = automaton()
    table = machine.transitions.view(-1, CLASS_COUNT).long()
    state = torch.arange(len(table), device="cpu")
    trace: list[Tensor] = []
    for symbol in classes:
        entry = table[state, symbol]
        state, action = entry & STATE_MASK, entry >> ACTION_SHIFT
        completes, alive = action >= CLOSE, machine.in_box[state]
        kept = [
            torch.where((earlier >= CLOSE << 5) | completes | (alive & (action != OPEN)), earlier, 0)
            for earlier in trace
        ]
        code = (action << 5) + torch.where((action == DIGIT) | (action == FRACTION), symbol, 0)
        trace = [*kept, torch.where(completes | alive, code, 0)]
    first, second = trace if len(trace) == 2 else (trace[0], torch.zeros_like(state))
    first, second = torch.where(first == 0, second, first), torch.where(first == 0, 0, second)
    return tuple(torch.cat([state, first, second]).tolist())


@lru_cache(maxsize=1)
def rewrites() -> dict[tuple[int, int], tuple[int, ...]]:
    """Pairs of classes -> a shorter or duller string of the same effect: one class, or a pair with OTHER in
    place of one of the two.

    Examples: `--` -> OTHER (no number has two signs), space space -> space, OTHER x -> OTHER unless x is `[`
    or `<`, `]]` -> `]` OTHER. Every rule is found by comparing effects from every state, so it holds in any
    surroundings, and so does any sequence of rules.
    """
    symbols = (OTHER, *range(OTHER))
    shortest: dict[tuple[int, ...], tuple[int, ...]] = {}
    for short in [(a,) for a in symbols] + [(OTHER, a) for a in symbols] + [(a, OTHER) for a in symbols]:
        shortest.setdefault(_effect(short), short)

    def cost(string: tuple[int, ...]) -> tuple[int, int]:
        return len(string), sum(symbol != OTHER for symbol in string)

    rules = {}
    for pair in product(symbols, repeat=2):
        shorter = shortest.get(_effect(pair))
        if shorter is not None and cost(shorter) < cost(pair):
            rules[pair] = shorter
    return rules


def shorten(classes: bytes) -> bytes:
    """Apply `rewrites` to a string of classes until none applies. The result reads the same in any
    surroundings and is never longer."""
    rules = rewrites()
    done: list[int] = []
    waiting = list(reversed(classes))
    while waiting:
        symbol = waiting.pop()
        shorter = rules.get((done[-1], symbol)) if done else None
        if shorter is None:
            done.append(symbol)
        else:
            done.pop()
            waiting.extend(reversed(shorter))
    return bytes(done)


# ------------------------------------------------------------------------------------------------ token table


@dataclass(frozen=True, eq=False)
class TokenTable:
    """What the box reader knows of a tokenizer, and its automaton, on one device. V vocabulary rows, S
    states.

    Token v is the classes `classes[offsets[v] : offsets[v + 1]]`, `width` at most; a special token, or a row
    that no token owns, is empty.
    """

    offsets: Tensor  # int32 [V + 1]
    classes: Tensor  # uint8 [sum of the tokens' lengths, at least 1]
    transitions: Tensor  # int16 [S * 32], as in Automaton
    final: Tensor  # uint8 [S], as in Automaton
    width: int  # classes of the longest token, at least 1

    @property
    def vocab_size(self) -> int:
        """V, the number of ids the table knows."""
        return self.offsets.shape[0] - 1

    def parts(self) -> tuple[list[Tensor], int]:
        """The tensors, in the order of the fields, and the width: what a registered operator takes."""
        return [self.offsets, self.classes, self.transitions, self.final], self.width

    @staticmethod
    def of(tensors: list[Tensor], width: int) -> TokenTable:
        """The table of these `parts`."""
        offsets, classes, transitions, final = tensors
        return TokenTable(offsets, classes, transitions, final, width)

    def to(self, device: torch.device | str) -> TokenTable:
        """The same table on `device`."""
        tensors, width = self.parts()
        return TokenTable.of([tensor.to(device) for tensor in tensors], width)


def token_texts(tokenizer: Any, vocab_size: int) -> list[str]:
    """The text that each id 0 .. vocab_size - 1 adds to a reply, [vocab_size] strings; "" for special tokens
    and for ids without a token.

    Each id is decoded *behind* another token, because decoders treat the first token of a text differently
    (they drop its leading space). Part of a UTF-8 character comes out as U+FFFD, which is as good as the
    bytes here: neither is ASCII.
    Raises ValueError for a tokenizer without a fast backend, or one whose decoder does not work token by
    token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        expected = "a fast Hugging Face tokenizer (one with backend_tokenizer)"
        raise ValueError(f"expected {expected}, got {type(tokenizer).__name__}")
    vocabulary = tokenizer.get_vocab()
    plain = ((c, vocabulary[c]) for c in map(chr, range(33, 127)) if c in vocabulary)
    spoken = ((c, token) for c, token in plain if backend.decode([token], skip_special_tokens=True) == c)
    prefix, anchor = next(spoken, ("", -1))
    if anchor < 0:
        raise ValueError(
            "expected a vocabulary with a token for at least one printable ASCII character, found none"
        )
    texts = backend.decode_batch([[anchor, token] for token in range(vocab_size)], skip_special_tokens=True)
    for token, text in enumerate(texts):
        if not text.startswith(prefix):
            got = f"{prefix!r} followed by id {token} decodes to {text!r}"
            raise ValueError(f"expected a decoder that works token by token, but {got}")
    return [text[len(prefix) :] for text in texts]


def build_token_table(tokenizer: Any, vocab_size: int) -> TokenTable:
    """Build the reader's table (CPU) from any fast Hugging Face tokenizer; once per tokenizer, seconds at
    most, the same bits every time.

    `vocab_size` is the number of rows of the model's embedding, which may exceed the tokenizer's: rows
    without a token add no characters, as when decoding. So do special tokens; other added tokens (such as
    "<think>" in some families) count with their text. Text is read byte by byte, each token for itself: a
    byte-fallback token for an ASCII byte counts as that byte even where its neighbours are not valid UTF-8.
    Raises ValueError for vocab_size < 1 and as `token_texts` does.
    """
    if vocab_size < 1:
        raise ValueError(f"expected vocab_size >= 1, got {vocab_size}")
    known: dict[bytes, bytes] = {}
    strings = []
    for text in token_texts(tokenizer, vocab_size):
        classes = text.encode("utf-8", "replace").translate(CLASS_OF_BYTE)
        if classes not in known:
            known[classes] = shorten(classes)
        strings.append(known[classes])
    lengths = torch.tensor([0, *map(len, strings)], device="cpu")
    joined = b"".join(strings) or bytes([PADDING])
    machine = automaton()
    return TokenTable(
        offsets=lengths.cumsum(0).to(torch.int32),
        classes=torch.frombuffer(bytearray(joined), dtype=torch.uint8),
        transitions=machine.transitions,
        final=machine.final,
        width=max(1, int(lengths.max())),
    )
