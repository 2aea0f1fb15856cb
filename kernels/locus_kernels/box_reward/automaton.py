"""The box reader's machine: character classes, and one small automaton that reads them.

The reader never sees text. A token is a short string of *classes* (one byte each), and an automaton reads
classes:

    token ids --TokenTable.offsets/classes--> classes --TokenTable.transitions--> states and actions
    --> numbers, flags

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

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------- classes
# One character stands for each class, in the order of the class numbers
ALPHABET = "0123456789+-.[], </>thinkaswer"
OTHER = len(ALPHABET)
PADDING = OTHER + 1
CLASS_COUNT = 32
WHITESPACE = b" \t\n\r\f\v"
_OTHER_CHARACTER = "?"


def _class_of_byte() -> bytes:
    table = bytearray([OTHER] * 256)
    for number, character in enumerate(ALPHABET):
        table[ord(character)] = number
    for space in WHITESPACE:
        table[space] = ALPHABET.index(" ")
    return bytes(table)


CLASS_OF_BYTE = _class_of_byte()  # 256 classes, for bytes.translate


# ---------------------------------------------------------------------------------------------------- actions
# What a step does to the box being read. A transition is one int16: the next state, plus the action shifted
# left by ACTION_SHIFT.
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
