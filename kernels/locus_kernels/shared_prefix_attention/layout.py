"""Where sequences lie in a packed row, on the host and on the device: built once a microbatch, read by every
layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from locus_kernels.transfer import send


@dataclass(frozen=True)
class Packed:
    """S sequences one after the other, with no padding. Known on the host too, so that nobody asks the device
    for a length."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor  # int32 [S + 1]

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Packed:
        """Sequences of these lengths, in this order; a sequence may be empty."""
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)
        return Packed(tuple(lengths), send(cu_seqlens, device))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """S + 1 offsets; the last is the number of tokens."""
        total, out = 0, [0]
        for length in self.lengths:
            total += length
            out.append(total)
        return tuple(out)

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    @cached_property
    def longest(self) -> int:
        return max(self.lengths, default=0)


@dataclass(frozen=True)
class Bucket:
    """Pairs of one shape: `count` of query_length x key_length. A slice of the packed row where they are
    neighbours, else an index."""

    count: int
    query_length: int
    key_length: int
    query: slice | Tensor  # of the packed query tokens, count * query_length of them
    key: slice | Tensor


@dataclass(frozen=True)
class Pairs:
    """Query sequence i attends to key sequence i: to all of it, or causally to a sequence of its own
    length."""

    queries: Packed
    keys: Packed
    causal: bool

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The pairs with work to do, by shape, for backends that run one shape at a time."""
        found: dict[tuple[int, int], list[int]] = {}
        for pair, shape in enumerate(zip(self.queries.lengths, self.keys.lengths, strict=True)):
            if min(shape) > 0:
                found.setdefault(shape, []).append(pair)
        return [
            Bucket(len(pairs), *shape, _tokens(self.queries, pairs), _tokens(self.keys, pairs))
            for shape, pairs in found.items()
        ]


def _tokens(packed: Packed, chosen: list[int]) -> slice | Tensor:
    """The tokens of the chosen sequences, which are of one length."""
    starts, length = packed.starts, packed.lengths[chosen[0]]
    if all(starts[b] == starts[a] + length for a, b in pairwise(chosen)):
        return slice(starts[chosen[0]], starts[chosen[0]] + length * len(chosen))
    index = torch.tensor([starts[i] for i in chosen])[:, None] + torch.arange(length)
    return send(index.flatten(), packed.cu_seqlens.device)


@dataclass(frozen=True)
class SharedPrefixLayout:
    """Replies packed group by group; the replies of a group attend to its prompt and, each, to itself."""

    # all reply tokens of a group to its prompt: one pair a prompt, an empty query for a prompt whose replies
    # are not here
    to_prompt: Pairs
    to_self: Pairs  # each reply to itself, causally

    @staticmethod
    def of(prompts: Packed, lengths: Sequence[Sequence[int]]) -> SharedPrefixLayout:
        """lengths: for each prompt, the lengths of its replies; groups of any sizes, and empty ones."""
        if len(lengths) != len(prompts.lengths):
            expected = f"the reply lengths of each of {len(prompts.lengths)} prompts"
            raise ValueError(f"lengths: expected {expected}, got {len(lengths)}")
        device = prompts.cu_seqlens.device
        groups = Packed.of([sum(group) for group in lengths], device)
        replies = Packed.of([n for group in lengths for n in group], device)
        return SharedPrefixLayout(Pairs(groups, prompts, causal=False), Pairs(replies, replies, causal=True))
