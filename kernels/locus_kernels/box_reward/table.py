"""What a reply's tokens mean to the box reader: character classes, one small automaton, and a table of tokens
built once.

The reader never sees text. A token is a short string of *classes* (one byte each), and an automaton reads
classes:

    token ids --TokenTable.offsets/classes--> classes --TokenTable.transitions--> states and actions --> numbers, flags

**Classes** (`CLASS_COUNT` = 32). Class number d is the digit d; then `+ - . [ ] ,`, white space (the six
characters of ASCII are one class), `< / >`, the ten letters of the words "think" and "answer", `OTHER` for
every other byte (all bytes past ASCII among them), and `PADDING`, which stands for no character at all and
changes nothing.

**Automaton.** One deterministic machine follows three things at once, so that one table serves every way of
reading:
- the *lexeme*: how much of a box or of a tag has been read. A box holds no `[` and a tag holds no `<` except
  its first character, so either character abandons what was begun and starts afresh; that is just what a
  left-to-right regular expression search does;
- the *answer*: before, inside or after the first `<answer>...</answer>`;
- the *shape* of the whole reply under both grammars of the format flag.

The machine is written as plain Python over small tuples (`_step`) and turned into a table by visiting every
state that can be reached.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------- classes
ALPHABET = (
    "0123456789+-.[], </>thinkaswer"  # one character stands for each class, in the order of the class numbers
)
OTHER = len(ALPHABET)
PADDING = OTHER + 1
CLASS_COUNT = 32
WHITESPACE = b" \t\n\r\f\v"
_OTHER_CHARACTER = "?"

# ---------------------------------------------------------------------------------------------------- actions
# What a step does to the box being read. A transition is one int16: the next state, plus the action shifted left by ACTION_SHIFT.
NOTHING = 0  # no effect on the numbers
OPEN = 1  # a box begins at this '[': forget the numbers of any box begun before
MINUS = 2  # the number now beginning is negative
DIGIT = 3  # the class is a digit before the point
FRACTION = 4  # the class is a digit after the point
NEXT = 5  # the number is complete; the next one follows
CLOSE = 6  # the box is complete, outside the answer
CLOSE_IN_ANSWER = 7  # the box is complete, inside the first answer
ACTION_SHIFT = 9
STATE_MASK = (1 << ACTION_SHIFT) - 1

# ------------------------------------------------------------------------------------- flags of a final state
ANSWER_CLOSED = 1  # the first <answer> has its </answer>
THINK_ANSWER = 2  # the reply has the think/answer structure
DIRECT = 4  # the reply is one box and white space

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_BOX_PARTS = {  # (part of a number, kind of character) -> next part
    ("before", "space"): "before",
    ("before", "sign"): "sign",
    ("before", "digit"): "whole",
    ("sign", "digit"): "whole",
    ("whole", "digit"): "whole",
    ("whole", "."): "point",
    ("point", "digit"): "fraction",
    ("fraction", "digit"): "fraction",
    ("whole", "space"): "after",
    ("fraction", "space"): "after",
    ("after", "space"): "after",
}


class _State(NamedTuple):
    """A state of the automaton before it is numbered."""

    tag: str = ""  # the part of a tag read so far; "" when none is begun
    number: int = -1  # which of a box's four numbers is being read; -1 outside a box
    part: str = ""  # how far that number is: before, sign, whole, point, fraction, after; "" outside a box
    answer: str = "before"  # before, inside, after: where the first <answer>...</answer> stands
    thinking: str = (
        "start"  # start, think, between, answer, done, dead: progress through the think/answer structure
    )
    direct: str = "start"  # start, box, done, dead: progress through "white space, box, white space"


def _step_box(state: _State, character: str) -> tuple[int, str, int]:
    """The box's next (number, part) and the action of one character; (-1, "", NOTHING) when the character
    ends the attempt."""
    if character == "[":
        return 0, "before", OPEN
    if state.number < 0:
        return -1, "", NOTHING
    kind = (
        "digit" if character.isdigit() else {" ": "space", "+": "sign", "-": "sign"}.get(character, character)
    )
    part = _BOX_PARTS.get((state.part, kind), "")
    if part:
        digit_action = {"whole": DIGIT, "fraction": FRACTION}.get(part, NOTHING)
        return state.number, part, MINUS if character == "-" else digit_action
    if state.part in ("whole", "fraction", "after"):
        if character == "," and state.number < 3:
            return state.number + 1, "before", NEXT
        if character == "]" and state.number == 3:
            return -1, "", CLOSE
    return -1, "", NOTHING


def _step_thinking(state: _State, character: str, tag: str, closed: str) -> str:
    """Next stage of the think/answer structure; `tag` is the part of a tag read after this character,
    `closed` a tag it completes."""

    def may_become(expected: str) -> bool:
        grown = state.tag + character
        return (
            closed == expected
            or (tag == grown and expected.startswith(grown))
            or (character == " " and not state.tag)
        )

    if state.thinking == "start":
        return ("think" if closed else "start") if may_become("<think>") else "dead"
    if state.thinking == "between" and may_become("<answer>"):
        return "answer" if closed else "between"
    if state.thinking in ("think", "between"):
        return "between" if closed == "</think>" else "think"
    if state.thinking in ("answer", "done"):
        return (
            "done" if closed == "</answer>" or (state.thinking == "done" and character == " ") else "answer"
        )
    return "dead"


def _step(state: _State, character: str) -> tuple[_State, int]:
    """One character: (next state, action). A character that is not in `ALPHABET` stands for OTHER."""
    grown = state.tag + character
    closed = grown if grown in _TAGS else ""
    tag = (
        ""
        if closed
        else grown
        if any(t.startswith(grown) for t in _TAGS)
        else "<"
        if character == "<"
        else ""
    )
    number, part, action = _step_box(state, character)

    answer = state.answer
    if answer == "before" and closed == "<answer>":
        answer = "inside"
    elif answer == "inside" and closed == "</answer>":
        answer = "after"

    direct = "dead"
    if state.direct in ("start", "done") and character == " ":
        direct = state.direct
    elif (state.direct == "start" and action == OPEN) or (
        state.direct == "box" and number >= 0 and action != OPEN
    ):
        direct = "box"
    elif state.direct == "box" and action == CLOSE:
        direct = "done"

    if action == CLOSE and answer == "inside":
        action = CLOSE_IN_ANSWER
    thinking = _step_thinking(state, character, tag, closed)
    return _State(tag, number, part, answer, thinking, direct), action


class Automaton(NamedTuple):
    """The reader's machine as CPU tensors, S states; state 0 is where every reply starts.

    transitions int16 [S * 32]: at state * 32 + class, the next state plus (action << ACTION_SHIFT). final
    uint8 [S]: the flags ANSWER_CLOSED, THINK_ANSWER and DIRECT of a reply that ends in the state. in_box bool
    [S]: whether a box has been begun.
    """

    transitions: Tensor
    final: Tensor
    in_box: Tensor


@lru_cache(maxsize=1)
def automaton() -> Automaton:
    """Number every state that can be reached and tabulate its transitions."""
    numbers = {_State(): 0}
    states = [_State()]
    rows = []
    for state in states:  # grows while it is read: a breadth-first search
        row = []
        for character in ALPHABET + _OTHER_CHARACTER:
            following, action = _step(state, character)
            if following not in numbers:
                numbers[following] = len(states)
                states.append(following)
            row.append(numbers[following] | action << ACTION_SHIFT)
        rows.append([*row, numbers[state]])  # PADDING: stay
    assert len(states) <= STATE_MASK + 1, "a transition no longer fits its int16"
    final = [
        ANSWER_CLOSED * (s.answer == "after")
        | THINK_ANSWER * (s.thinking == "done")
        | DIRECT * (s.direct == "done")
        for s in states
    ]
    return Automaton(
        torch.tensor(rows, dtype=torch.int16, device="cpu").flatten(),
        torch.tensor(final, dtype=torch.uint8, device="cpu"),
        torch.tensor([s.number >= 0 for s in states], device="cpu"),
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
def _class_of_byte() -> bytes:
    table = bytearray([OTHER] * 256)
    for number, character in enumerate(ALPHABET):
        table[ord(character)] = number
    for space in WHITESPACE:
        table[space] = ALPHABET.index(" ")
    return bytes(table)


CLASS_OF_BYTE = _class_of_byte()  # 256 classes, for bytes.translate


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

    def to(self, device: torch.device | str) -> TokenTable:
        """The same table on `device`."""
        return replace(
            self,
            offsets=self.offsets.to(device),
            classes=self.classes.to(device),
            transitions=self.transitions.to(device),
            final=self.final.to(device),
        )


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
        raise ValueError(
            f"expected a fast Hugging Face tokenizer (one with backend_tokenizer), got {type(tokenizer).__name__}"
        )
    vocabulary = tokenizer.get_vocab()
    plain = ((c, vocabulary[c]) for c in map(chr, range(33, 127)) if c in vocabulary)
    prefix, anchor = next(
        ((c, token) for c, token in plain if backend.decode([token], skip_special_tokens=True) == c), ("", -1)
    )
    if anchor < 0:
        raise ValueError(
            "expected a vocabulary with a token for at least one printable ASCII character, found none"
        )
    texts = backend.decode_batch([[anchor, token] for token in range(vocab_size)], skip_special_tokens=True)
    for token, text in enumerate(texts):
        if not text.startswith(prefix):
            raise ValueError(
                f"expected a decoder that works token by token, but {prefix!r} followed by id {token} decodes to {text!r}"
            )
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
