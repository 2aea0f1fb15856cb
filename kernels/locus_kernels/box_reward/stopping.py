"""Where a reply has said what the reader looks for, token by token: the reader's automaton, reduced to that
one question."""

from __future__ import annotations

import torch
from torch import Tensor

from locus_kernels.box_reward.automaton import (
    ACTION_SHIFT,
    ANSWER_CLOSED,
    CLASS_COUNT,
    CLOSE,
    CLOSE_IN_ANSWER,
    STATE_MASK,
)
from locus_kernels.box_reward.table import TokenTable

CLOSED = 0  # the state of a reply that has said it; it never leaves it
START = 1  # the state of an empty reply
WHICH = ("first", "answer")


def closing_table(table: TokenTable, which: str) -> Tensor:
    """int16 [V, S] on CPU: the state after each token in each of S states, from START; CLOSED once the reply
    has closed

    - its first box (which = "first"), whatever follows being of no account to `box_reward(...,
      which="first")`, or
    - its answer, with `</answer>` (which = "answer").
    The machine is the reader's own with equivalent states merged (Moore 1956), so the two agree on every
    token sequence. Raises ValueError for another `which`: a reply's last box is known only at its end.
    """
    if which not in WHICH:
        raise ValueError(f"which: expected one of {', '.join(WHICH)}, got {which!r}")
    machine = _reduced(table, which)
    out = torch.arange(len(machine), dtype=torch.int16).repeat(table.vocab_size, 1)
    offsets, classes = table.offsets.cpu().long(), table.classes.cpu().long()
    token = torch.arange(table.vocab_size)
    for place in range(table.width):
        token = token[offsets[token + 1] - offsets[token] > place]
        out[token] = machine[out[token].long(), classes[offsets[token] + place][:, None]]
    return out


def _reduced(table: TokenTable, which: str) -> Tensor:
    """int16 [S, CLASS_COUNT]: the next state, with CLOSED and START first."""
    raw = table.transitions.cpu().long().view(-1, CLASS_COUNT)
    following, action = raw & STATE_MASK, raw >> ACTION_SHIFT
    closed = len(raw)  # one state more, that is never left
    closes_box = (action == CLOSE) | (action == CLOSE_IN_ANSWER)
    closes = closes_box if which == "first" else (table.final.cpu()[following] & ANSWER_CLOSED) != 0
    machine = torch.cat([torch.where(closes, closed, following), torch.full((1, CLASS_COUNT), closed)])
    kind = (torch.arange(closed + 1) == closed).long()
    while True:  # split kinds until the states of each agree on the kinds that follow
        refined = torch.unique(torch.cat([kind[:, None], kind[machine]], 1), dim=0, return_inverse=True)[1]
        if refined.max() == kind.max():
            break
        kind = refined
    count = int(kind.max()) + 1
    ends = [int(kind[closed]), int(kind[0])]
    order = torch.tensor([*ends, *(k for k in range(count) if k not in ends)])
    number = torch.empty(count, dtype=torch.int16)
    number[order] = torch.arange(count, dtype=torch.int16)
    example = torch.empty(count, dtype=torch.int64)
    example[kind] = torch.arange(closed + 1)  # any state of each kind
    return number[kind[machine[example[order]]]]
