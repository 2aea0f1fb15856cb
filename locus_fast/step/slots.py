"""The decoder's state in buffers of a fixed address, and what lets a device run ahead of its host: CUDA
graphs, and a count of running rows that arrives some steps late.

Legend: B prompts, G replies a prompt, R = B * G rows of the rollout, S slots at work, K key heads, D head
dimension, L longest reply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locus_fast.cost.shapes import PROMPT_STEP, rung


@dataclass(frozen=True)
class Extent:
    """How large the buffers are."""

    slots: int
    prompts: int
    prompt_tokens: int  # of all prompts together
    longest_prompt: int
    longest_reply: int

    @staticmethod
    def of(rows: int, group_size: int, prompt_lengths: tuple[int, ...], longest_reply: int) -> Extent:
        """Exactly as large as these replies to these prompts need."""
        longest = max(prompt_lengths, default=0)
        return Extent(rows, rows // group_size, sum(prompt_lengths), longest, longest_reply)

    def rounded(self, group_size: int) -> Extent:
        """Rounded up to the few sizes that graphs are captured for."""
        tokens, longest = (
            -(-n // PROMPT_STEP) * PROMPT_STEP for n in (self.prompt_tokens, self.longest_prompt)
        )
        slots = rung(self.slots)
        return Extent(slots, max(slots // group_size, self.prompts), tokens, longest, self.longest_reply)

    def holds(self, other: Extent) -> bool:
        return all(
            mine >= theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
        )

    def joined(self, other: Extent) -> Extent:
        """Large enough for both."""
        return Extent(**{name: max(value, getattr(other, name)) for name, value in vars(self).items()})


class Slots:
    """A slot is a reply being decoded. Of the buffers' slots the first `rows` are at work."""

    def __init__(self, extent: Extent, group_size: int, kv: dict[int, tuple[Tensor, Tensor]]):
        """kv: any prompt's keys and values [N, K, D] by layer, for their heads, dtype and device."""
        first = next(iter(kv.values()))[0]
        device, capacity, longest = first.device, extent.slots, extent.longest_reply
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.extent, self.group_size, self.rows = extent, group_size, capacity
        self.token, self.phase, self.base = (torch.zeros(capacity, **whole) for _ in range(3))
        self.identity = torch.zeros(capacity, **whole)  # in the seed's stream
        self.order = torch.zeros(capacity, **whole)  # the slot's row of the rollout; `idle` for an idle slot
        # extent.prompts for an idle slot
        self.group = torch.zeros(capacity, dtype=torch.int32, device=device)
        self.running = torch.zeros(capacity, dtype=torch.bool, device=device)
        self.at = torch.zeros(1, **whole)  # tokens sampled so far
        self.own_lengths = torch.zeros(capacity, dtype=torch.int32, device=device)
        self.cu_rows = torch.zeros(extent.prompts + 1, dtype=torch.int32, device=device)
        self.own = {
            layer: tuple(k.new_zeros(capacity, k.shape[1], longest, k.shape[2]) for _ in range(2))
            for layer, (k, _) in kv.items()
        }
        self.idle = capacity  # the row of the outputs that idle slots write to
        self.ids = torch.zeros(capacity + 1, longest, **whole)
        self.logprob = torch.zeros(capacity + 1, longest, device=device)
        self.lengths = torch.zeros(capacity + 1, **whole)
        self.ended = torch.zeros(capacity + 1, dtype=torch.bool, device=device)

    def start(self, rows: int, identity: Tensor, position: Tensor, phase: int, stop: Tensor) -> None:
        """Every slot as before the first token: a slot for each reply, the others idle, outputs empty.

        rows: slots to work with; identity int64 [R], of each reply; position int64 [B], of each prompt's
        first reply token; phase: the state in which a reply starts; stop: int64 [], what fills the ids.
        """
        R, device = len(identity), identity.device
        self.rows = rows
        self.at.fill_(0)
        self.phase.fill_(phase)
        self.order.fill_(self.idle)
        self.group.fill_(self.extent.prompts)
        self.running.fill_(False)
        place = torch.arange(R, device=device)
        self.identity[:R], self.order[:R], self.running[:R] = identity, place, True
        self.group[:R] = (place // self.group_size).int()
        self.base[:R] = position.repeat_interleave(self.group_size)
        self.ids.copy_(stop.expand_as(self.ids))
        self.lengths.fill_(self.extent.longest_reply)
        self.logprob.zero_()
        self.ended.fill_(False)
        self.regroup()

    def regroup(self) -> None:
        """cu_rows from the slots' groups, which are ascending."""
        bounds = torch.arange(self.extent.prompts + 1, dtype=torch.int32, device=self.group.device)
        self.cu_rows.copy_(torch.searchsorted(self.group[: self.rows], bounds, out_int32=True))

    def compact(self, rows: int, past: int) -> None:
        """Go on with `rows` slots: those that run, in their order, then idle ones. past: tokens of their own
        past."""
        order = torch.argsort(self.running[: self.rows].to(torch.uint8), descending=True, stable=True)
        keep = order[:rows]
        for t in (self.token, self.phase, self.base, self.identity, self.order, self.group, self.running):
            t[:rows] = t[keep]
        for pair in self.own.values():
            for t in pair:
                t[:rows, :, :past] = t[keep, :, :past]
        self.rows = rows
        idle = ~self.running[:rows]
        self.order[:rows].masked_fill_(idle, self.idle)
        self.group[:rows].masked_fill_(idle, self.extent.prompts)
        self.regroup()


class Graph:
    """A function of no arguments over static buffers, replayed as one CUDA graph from its second call on.
    Graphs share one memory pool: they never run at once, and leave nothing in it."""

    def __init__(self, function: Callable[[], None], other: Graph | None):
        self.function, self.warm = function, False
        self.graph: Any = None
        self.pool: Any = other.pool if other else torch.cuda.graph_pool_handle()

    def __call__(self) -> None:
        if not self.warm:
            self.function()
            self.warm = True
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool):
                self.function()
        self.graph.replay()


class Count:
    """How many slots are still running, told to the host `lag` steps later: the device always has that many
    steps queued, and the host, which could queue every step before the first has ended, does not run further
    ahead. The number can only fall, so an old one is safe, and its age is the same every time, so that two
    runs compact alike."""

    def __init__(self, lag: int, on_cuda: bool):
        self.lag, self.asked = lag, 0
        self.buffer = torch.empty(lag, dtype=torch.int64, pin_memory=on_cuda)
        self.events = [torch.cuda.Event() for _ in range(lag)] if on_cuda else []

    def ask(self, running: Tensor) -> None:
        """Have the number sent."""
        place = self.asked % self.lag
        self.buffer[place].copy_(running.sum(), non_blocking=True)
        if self.events:
            self.events[place].record()
        self.asked += 1

    def known(self, most: int) -> int:
        """The number `lag` questions ago; `most` before that."""
        if self.asked < self.lag:
            return most
        place = self.asked % self.lag
        if self.events:
            self.events[place].synchronize()
        return int(self.buffer.numpy()[place])
