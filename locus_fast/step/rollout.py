"""Sampling replies over the shared prefix: static buffers, one CUDA graph for each number of rows, and a device that never idles.

A reply is a *slot* of the decoder. Every step feeds each slot's last token, attends to the group's prompt and the slot's own past, and samples. The
number of replies still running reaches the host some steps late (`Count`); when it falls below the next smaller number of rows (`LADDER`), the
running slots are moved together and the others dropped.

Legend: B prompts, G replies a prompt, R = B * G rows of the rollout, S slots at work, K key heads, D head dimension, L longest reply, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from locus_kernels.box_reward import CLOSED, START, TokenTable, closing_table
from locus_kernels.sample import sample
from locus_kernels.shared_prefix_attention import send
from locus_kernels.shared_prefix_decode import shared_prefix_decode
from torch import Tensor

from locus_fast.cost.shapes import LADDER, PROMPT_STEP
from locus_fast.errors import UserError
from locus_fast.model.policy import Prefix, next_logits

LAG = 4  # steps that CUDA has queued while the host decides on the next


def rung(rows: int) -> int:
    """The fewest slots of the ladder that hold so many rows."""
    return next((n for n in LADDER if n >= rows), rows)


@dataclass(frozen=True)
class Rollout:
    """What was sampled for B prompts, G replies each; row r belongs to prompt r // G."""

    ids: Tensor  # int64 [R, L]; past a reply's length a stop id
    lengths: Tensor  # int64 [R], the stop token included
    logprob: Tensor  # float32 [R, L], the sampler's; 0 past the length


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; temperature 0 is greedy."""

    replies: int
    max_tokens: int
    temperature: float
    top_p: float


@dataclass(frozen=True)
class Vocabulary:
    """Which ids a reply may hold, and what ends it: a stop id, or that it has said what the reader looks for."""

    allowed: Tensor  # bool [V]
    stops: Tensor  # int64 [stops]
    closing: Tensor | None = None  # int16 [V, states], see `closing_table`
    start: int = START  # the state in which a reply starts

    @staticmethod
    def of(model: Any, tokenizer: Any, table: TokenTable | None = None, which: str = "first", opening: Sequence[int] = ()) -> Vocabulary:
        """Rows past the tokenizer and vision tokens are never drawn: a placeholder in a reply would be taken for an image that is not there.

        table, which: replies end with the box that `box_reward` counts; without a table only with a stop id. opening: ids that the prompt has
        written of the reply already.
        """
        config, rows = model.config, model.lm_head.weight.shape[0]
        allowed = torch.arange(rows) < len(tokenizer)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            if (token := getattr(config, name, None)) is not None:
                allowed[token] = False
        stated = model.generation_config.eos_token_id
        stops = [tokenizer.eos_token_id] if stated is None else stated if isinstance(stated, list) else [stated]
        if None in stops:
            raise UserError("neither the model's generation_config.json nor its tokenizer names an end-of-sequence token; a reply could not end.")
        device, closing, start = model.lm_head.weight.device, None, START
        if table is not None:
            closing = closing_table(table, which)
            for token in opening:
                start = int(closing[token, start])
        return Vocabulary(allowed.to(device), torch.tensor(stops, device=device), closing if closing is None else closing.to(device), start)


class Slots:
    """The decoder's state: buffers of a fixed address, of which the first `rows` slots are at work."""

    def __init__(self, prefix: Prefix, capacity: int, rollout_rows: int, sampling: Sampling, prompts: int):
        device, hidden = prefix.last_hidden.device, prefix.last_hidden
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.prompts, self.replies, self.capacity = prompts, sampling.replies, capacity
        self.rows = capacity
        self.token, self.phase, self.base = (torch.zeros(capacity, **whole) for _ in range(3))
        self.identity = torch.zeros(capacity, **whole)  # in the seed's stream
        self.order = torch.zeros(capacity, **whole)  # the slot's row of the rollout; rollout_rows for an idle slot
        self.group = torch.zeros(capacity, dtype=torch.int32, device=device)  # `prompts` for an idle slot
        self.running = torch.zeros(capacity, dtype=torch.bool, device=device)
        self.at = torch.zeros(1, **whole)  # tokens sampled so far
        self.own_lengths = torch.zeros(capacity, dtype=torch.int32, device=device)
        self.cu_rows = torch.zeros(prompts + 1, dtype=torch.int32, device=device)
        self.own = {
            layer: tuple(hidden.new_zeros(capacity, k.shape[1], sampling.max_tokens, k.shape[2]) for _ in range(2))
            for layer, (k, _) in prefix.kv.items()
        }
        self.ids = torch.zeros(rollout_rows + 1, sampling.max_tokens, **whole)  # the last row is the idle slots'
        self.logprob = torch.zeros(rollout_rows + 1, sampling.max_tokens, device=device)
        self.lengths = torch.zeros(rollout_rows + 1, **whole)
        self.idle = rollout_rows

    def regroup(self) -> None:
        """cu_rows from the slots' groups, which are ascending."""
        bounds = torch.arange(self.prompts + 1, dtype=torch.int32, device=self.group.device)
        self.cu_rows.copy_(torch.searchsorted(self.group[: self.rows], bounds, out_int32=True))

    def compact(self, rows: int, past: int) -> None:
        """Go on with `rows` slots: those that run, in their order, then idle ones. past: tokens of their own past so far."""
        keep = torch.argsort(self.running[: self.rows].to(torch.uint8), descending=True, stable=True)[:rows]
        for t in (self.token, self.phase, self.base, self.identity, self.order, self.group, self.running):
            t[:rows] = t[keep]
        for pair in self.own.values():
            for t in pair:
                t[:rows, :, :past] = t[keep, :, :past]
        self.rows = rows
        idle = ~self.running[:rows]
        self.order[:rows].masked_fill_(idle, self.idle)
        self.group[:rows].masked_fill_(idle, self.prompts)
        self.regroup()


class Decoder:
    """The policy's sampler. Keep one for a run: on CUDA its buffers and graphs are used again by every microbatch that fits them.

    static: buffers that stay where they are, and steps that only the device can tell apart, as graphs need; by default on CUDA.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, static: bool | None = None):
        self.model, self.vocabulary = model, vocabulary
        self.is_static = vocabulary.allowed.is_cuda if static is None else static
        self.is_stop = torch.zeros_like(vocabulary.allowed).index_fill_(0, vocabulary.stops, True)
        self.graphs: dict[int, Graph] = {}  # by the number of slots
        self.slots: Slots | None = None
        self.static: tuple = ()
        self.prompt_kv: dict[int, tuple[Tensor, ...]] = {}

    def release(self) -> None:
        """Gives back its buffers and graphs; the next rollout makes them anew."""
        self.graphs.clear()
        self.slots, self.static, self.prompt_kv = None, (), {}

    def generate(self, prefix: Prefix, sampling: Sampling, *, seed: int, groups: Sequence[int]) -> Rollout:
        """Replies of every prompt in the prefix.

        groups: the identity of each prompt in this seed's stream, so that a prompt's replies do not depend on the microbatch it fell into.
        """
        training = self.model.training
        self.model.eval()  # in training mode, layers that recompute would look at the random state, which a graph may not
        try:
            with torch.no_grad():
                return self._generate(prefix, sampling, seed, groups)
        finally:
            self.model.train(training)

    def _generate(self, prefix: Prefix, sampling: Sampling, seed: int, groups: Sequence[int]) -> Rollout:
        G, B, device = sampling.replies, len(prefix.batch.lengths), prefix.last_hidden.device
        R = B * G
        slots = self.load(prefix, sampling, seed, send(torch.tensor(groups, dtype=torch.int64)[:, None] * G + torch.arange(G), device).flatten())
        logits = next_logits(self.model, prefix.last_hidden.detach()).repeat_interleave(G, 0)
        self.choose(torch.cat([logits, logits.new_zeros(slots.rows - R, logits.shape[1])]) if slots.rows > R else logits)
        count = Count(LAG if slots.running.is_cuda else 1, slots.running.is_cuda)
        for at in range(1, sampling.max_tokens):
            count.ask(slots.running[: slots.rows])
            running = count.known(slots.rows)
            if running == 0:
                break
            rows = rung(running)
            if rows < slots.rows:
                slots.compact(rows, at - 1)
            self.advance(at)
        return Rollout(slots.ids[:R].clone(), slots.lengths[:R].clone(), slots.logprob[:R].clone())

    def load(self, prefix: Prefix, sampling: Sampling, seed: int, identity: Tensor) -> Slots:
        """Slots for every reply, on the prefix's keys and values. On CUDA the buffers are rounded up, and kept while they are large enough."""
        packed, kv = prefix.batch.pairs.queries, prefix.kv
        B, R = len(packed.lengths), len(identity)
        self.sampling, self.seed = sampling, seed
        if self.is_static:
            capacity = rung(R)
            wanted = (
                sampling,
                seed,
                capacity,
                capacity // sampling.replies,
                *(-(-n // PROMPT_STEP) * PROMPT_STEP for n in (packed.tokens, packed.longest)),
            )
            if not self.static or wanted[:2] != self.static[:2] or any(w > s for w, s in zip(wanted[2:], self.static[2:], strict=True)):
                before = self.static[2:] if wanted[:2] == self.static[:2] else wanted[2:]
                self.release()
                self.static = (*wanted[:2], *(max(pair) for pair in zip(wanted[2:], before, strict=True)))
                _, _, capacity, prompts, tokens, self.longest_prompt = self.static
                self.slots = Slots(prefix, capacity, capacity, sampling, max(prompts, B))
                self.prompt_kv = {i: tuple(k.new_empty(k.shape[1], tokens, k.shape[2]).transpose(0, 1) for k in pair) for i, pair in kv.items()}
                self.cu_prompts = torch.zeros(self.slots.prompts + 1, dtype=torch.int32, device=identity.device)
            slots = self.slots
            assert slots is not None
            for layer, pair in kv.items():
                for buffer, t in zip(self.prompt_kv[layer], pair, strict=True):
                    buffer[: packed.tokens].copy_(t)
            self.cu_prompts[: B + 1].copy_(packed.cu_seqlens)
            self.cu_prompts[B + 1 :].fill_(packed.tokens)
        else:  # key heads outside, so that prompts of one length are one batch of matrices
            self.prompt_kv = {i: tuple(t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in pair) for i, pair in kv.items()}
            self.cu_prompts, self.longest_prompt = packed.cu_seqlens, packed.longest
            slots = self.slots = Slots(prefix, R, R, sampling, B)
        slots.rows = rung(R) if self.is_static else R
        idle = slots.idle
        for t, value in (
            (slots.at, 0),
            (slots.phase, self.vocabulary.start),
            (slots.order, idle),
            (slots.group, slots.prompts),
            (slots.running, False),
        ):
            t.fill_(value)
        place = torch.arange(R, device=identity.device)
        slots.identity[:R], slots.order[:R], slots.running[:R] = identity, place, True
        slots.group[:R] = (place // sampling.replies).int()
        slots.base[:R] = (prefix.batch.position[0, prefix.batch.last] + 1).repeat_interleave(sampling.replies)
        slots.ids.copy_(self.vocabulary.stops[0].expand_as(slots.ids))
        slots.lengths.fill_(sampling.max_tokens)
        slots.logprob.zero_()
        slots.regroup()
        return slots

    def choose(self, logits: Tensor) -> None:
        """Sample the next token of every slot and note it. logits [S, V]."""
        slots, words, sampling = self.slots, self.vocabulary, self.sampling
        assert slots is not None
        S = slots.rows
        drawn: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "allowed": words.allowed}
        token, value = sample(logits, seed=self.seed, row=slots.identity[:S], position=slots.at, **drawn)
        running, order, place = slots.running[:S], slots.order[:S], slots.at.expand(S)
        slots.token[:S] = token
        slots.ids.index_put_((order, place), torch.where(running, token, words.stops[0]))
        slots.logprob.index_put_((order, place), torch.where(running, value, 0.0))
        slots.at += 1
        ended = self.is_stop[token]
        if words.closing is not None:
            phase = words.closing[token, slots.phase[:S]]
            slots.phase[:S] = phase
            ended = ended | (phase == CLOSED)
        ended = ended & running
        slots.lengths.index_put_((order,), torch.where(ended, slots.at, slots.lengths[order]))
        slots.running[:S] = running & ~ended

    def step(self, longest_own: int | None) -> None:
        """Feed every slot its last token and sample the next. longest_own: tokens of their own past, None where only the device knows."""
        slots, language = self.slots, self.model.model.language_model
        assert slots is not None
        S = slots.rows
        slots.own_lengths[:S] = slots.at.int()
        position = (slots.base[:S] + slots.at - 1).view(1, -1, 1).expand(3, -1, -1)
        embeds = language.embed_tokens(slots.token[:S])[:, None]
        context = DecodePass(self, slots, longest_own)
        hidden = language(inputs_embeds=embeds, position_ids=position, use_cache=False, locus=context).last_hidden_state[:, 0]
        self.choose(next_logits(self.model, hidden))

    def advance(self, at: int) -> None:
        """One step; on CUDA by the graph of this number of slots, which the second step of its kind captures (the first warms up)."""
        assert self.slots is not None
        if not self.is_static:
            self.step(at)
            return
        if self.slots.rows not in self.graphs:
            self.graphs[self.slots.rows] = Graph(lambda: self.step(None), next(iter(self.graphs.values()), None))
        self.graphs[self.slots.rows]()


class DecodePass:
    """One new token of each slot attends to its group's prompt and to its own past."""

    def __init__(self, decoder: Decoder, slots: Slots, longest_own: int | None):
        self.decoder, self.slots, self.longest_own = decoder, slots, longest_own

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None) -> Tensor:
        slots, decoder = self.slots, self.decoder
        S, past = slots.rows, slots.at - 1
        own_k, own_v = (t[:S] for t in slots.own[module.layer_idx])
        prompt_k, prompt_v = decoder.prompt_kv[module.layer_idx]
        own_k.index_copy_(2, past, k)
        own_v.index_copy_(2, past, v)
        out = shared_prefix_decode(
            q[:, :, 0],
            prompt_k,
            prompt_v,
            decoder.cu_prompts,
            own_k,
            own_v,
            slots.own_lengths[:S],
            slots.cu_rows,
            scale=scale,
            longest_prompt=decoder.longest_prompt,
            most_rows=slots.replies,
            longest_own=self.longest_own,
        )
        return out[:, None]


class Graph:
    """A function of no arguments over static buffers, replayed as one CUDA graph from its second call on. Graphs share one memory pool: they never
    run at once, and leave nothing in it."""

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
    """How many slots are still running, told to the host `lag` steps later: the device always has that many steps queued, and the host, which could
    queue every step before the first has ended, does not run further ahead. The number can only fall, so old news is safe, and its age is the same
    every time, so that two runs compact alike."""

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
