"""Sampling replies over the shared prefix: static buffers, one CUDA graph for each number of rows, and a
device that never idles.

Every decoding step feeds each slot's last token, attends to the group's prompt and the slot's own past, and
samples. The number of replies still running reaches the host some steps late; when it falls below the next
smaller number of rows (`cost.shapes.LADDER`), the running slots are moved together and the others dropped.

Legend: B prompts, G replies a prompt, R = B * G rows of the rollout, S slots at work, K key heads, D head
dimension, L longest reply, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from locus_kernels.box_reward import CLOSED
from locus_kernels.sample import sample
from locus_kernels.shared_prefix_attention import send
from locus_kernels.shared_prefix_decode import shared_prefix_decode
from torch import Tensor

from locus_fast.cost.shapes import rung
from locus_fast.model.policy import Prefix, next_logits
from locus_fast.step.slots import Count, Extent, Graph, Slots
from locus_fast.step.vocabulary import Vocabulary

LAG = 4  # steps that CUDA has queued while the host decides on the next


@dataclass(frozen=True)
class Rollout:
    """What was sampled for B prompts, G replies each; row r belongs to prompt r // G."""

    ids: Tensor  # int64 [R, L]; past a reply's length a stop id
    lengths: Tensor  # int64 [R], the stop token included
    logprob: Tensor  # float32 [R, L], the sampler's; 0 past the length
    truncated: Tensor  # bool [R], cut at L tokens before it ended

    def rows(self, chosen: Tensor) -> Rollout:
        """The rollout of some rows, int64 [n]."""
        return Rollout(self.ids[chosen], self.lengths[chosen], self.logprob[chosen], self.truncated[chosen])


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; temperature 0 is greedy."""

    group_size: int
    max_new_tokens: int
    temperature: float
    top_p: float


class Decoder:
    """The policy's sampler. Keep one for a run: on CUDA its buffers and graphs are used again by every
    microbatch that fits them.

    static: buffers that stay where they are, and steps that only the device can tell apart, as graphs need;
    by default on CUDA.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, static: bool | None = None):
        self.model, self.vocabulary = model, vocabulary
        self.is_static = vocabulary.allowed.is_cuda if static is None else static
        self.is_stop = torch.zeros_like(vocabulary.allowed).index_fill_(0, vocabulary.stops, True)
        self.graphs: dict[int, Graph] = {}  # by the number of slots
        self.slots: Slots | None = None
        self.sampling = Sampling(1, 1, 0.0, 1.0)
        self.seed = 0
        self.prompt_kv: dict[int, tuple[Tensor, ...]] = {}  # layer -> keys and values [N, K, D]
        self.cu_prompts = torch.zeros(1, dtype=torch.int32)  # int32 [prompts + 1]
        self.longest_prompt = 0

    def release(self) -> None:
        """Gives back its buffers and graphs; the next rollout makes them anew."""
        self.graphs.clear()
        self.slots, self.prompt_kv = None, {}

    def generate(self, prefix: Prefix, sampling: Sampling, *, seed: int, groups: Sequence[int]) -> Rollout:
        """Replies of every prompt in the prefix.

        groups: the identity of each prompt in this seed's stream, so that a prompt's replies do not depend on
        the microbatch it fell into.
        """
        training = self.model.training
        # in training mode, layers that recompute would look at the random state: no graph may
        self.model.eval()
        try:
            with torch.no_grad():
                return self._generate(prefix, sampling, seed, groups)
        finally:
            self.model.train(training)

    def _generate(self, prefix: Prefix, sampling: Sampling, seed: int, groups: Sequence[int]) -> Rollout:
        G, R, device = sampling.group_size, sampling.group_size * len(groups), prefix.last_hidden.device
        identity = send(
            torch.tensor(groups, dtype=torch.int64)[:, None] * G + torch.arange(G), device
        ).flatten()
        slots = self._load(prefix, sampling, seed, identity)
        logits = next_logits(self.model, prefix.last_hidden.detach()).repeat_interleave(G, 0)
        idle = logits.new_zeros(slots.rows - R, logits.shape[1])
        self.choose(torch.cat([logits, idle]) if len(idle) else logits)
        count = Count(LAG if slots.running.is_cuda else 1, slots.running.is_cuda)
        for at in range(1, sampling.max_new_tokens):
            count.ask(slots.running[: slots.rows])
            running = count.known(slots.rows)
            if running == 0:
                break
            if (rows := rung(running)) < slots.rows:
                slots.compact(rows, at - 1)
            self.advance(at)
        ids, lengths, logprob, ended = (
            t[:R].clone() for t in (slots.ids, slots.lengths, slots.logprob, slots.ended)
        )
        return Rollout(ids, lengths, logprob, ~ended)

    def _load(self, prefix: Prefix, sampling: Sampling, seed: int, identity: Tensor) -> Slots:
        """Slots for every reply, on the prefix's keys and values."""
        packed = prefix.batch.pairs.queries
        needed = Extent.of(len(identity), sampling.group_size, packed.lengths, sampling.max_new_tokens)
        slots = (
            self._static(prefix, needed, sampling, seed)
            if self.is_static
            else self._exact(prefix, needed, sampling)
        )
        self.sampling, self.seed = sampling, seed
        rows = rung(needed.slots) if self.is_static else needed.slots
        position = prefix.batch.position[0, prefix.batch.last] + 1
        slots.start(rows, identity, position, self.vocabulary.start, self.vocabulary.stops[0])
        return slots

    def _exact(self, prefix: Prefix, needed: Extent, sampling: Sampling) -> Slots:
        """Buffers for this rollout alone. Key heads outside, so that prompts of one length are a batch of
        matrices."""
        packed = prefix.batch.pairs.queries
        self.prompt_kv = {
            layer: tuple(t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in pair)
            for layer, pair in prefix.kv.items()
        }
        self.cu_prompts, self.longest_prompt = packed.cu_seqlens, packed.longest
        self.slots = Slots(needed, sampling.group_size, prefix.kv)
        return self.slots

    def _static(self, prefix: Prefix, needed: Extent, sampling: Sampling, seed: int) -> Slots:
        """Buffers that are rounded up, and kept while they are large enough: graphs hold their addresses, and
        the sampling and the seed as constants."""
        wanted, same = needed.rounded(sampling.group_size), (sampling, seed) == (self.sampling, self.seed)
        kept = self.slots
        if kept is None or not same or not kept.extent.holds(wanted):
            extent = kept.extent.joined(wanted) if kept is not None and same else wanted
            self.release()
            kept = self.slots = Slots(extent, sampling.group_size, prefix.kv)
            tokens = extent.prompt_tokens
            self.prompt_kv = {
                layer: tuple(k.new_empty(k.shape[1], tokens, k.shape[2]).transpose(0, 1) for k in pair)
                for layer, pair in prefix.kv.items()
            }
            self.cu_prompts = torch.zeros(
                extent.prompts + 1, dtype=torch.int32, device=prefix.last_hidden.device
            )
            self.longest_prompt = extent.longest_prompt
        for layer, pair in prefix.kv.items():
            for buffer, t in zip(self.prompt_kv[layer], pair, strict=True):
                buffer[: needed.prompt_tokens].copy_(t)
        self.cu_prompts[: needed.prompts + 1].copy_(prefix.batch.pairs.queries.cu_seqlens)
        self.cu_prompts[needed.prompts + 1 :].fill_(needed.prompt_tokens)
        return kept

    def choose(self, logits: Tensor) -> None:
        """Sample the next token of every slot and note it. logits float32 [S, V]."""
        slots, words, sampling = self.slots, self.vocabulary, self.sampling
        assert slots is not None
        S = slots.rows
        token, value = sample(
            logits,
            seed=self.seed,
            row=slots.identity[:S],
            position=slots.at,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            allowed=words.allowed,
        )
        running, order, place = slots.running[:S], slots.order[:S], slots.at.expand(S)
        slots.token[:S] = token
        slots.ids.index_put_((order, place), torch.where(running, token, words.stops[0]))
        slots.logprob.index_put_((order, place), torch.where(running, value, 0.0))
        slots.at += 1
        ends = self.is_stop[token]
        if words.closing is not None:
            phase = words.closing[token, slots.phase[:S]]
            slots.phase[:S] = phase
            ends = ends | (phase == CLOSED)
        ends = ends & running
        slots.lengths.index_put_((order,), torch.where(ends, slots.at, slots.lengths[order]))
        slots.ended.index_put_((order,), ends | slots.ended[order])
        slots.running[:S] = running & ~ends

    def step(self, longest_own: int | None) -> None:
        """Feed every slot its last token and sample the next. longest_own: tokens of their own past, None
        where only the device knows."""
        slots, language = self.slots, self.model.model.language_model
        assert slots is not None
        S = slots.rows
        slots.own_lengths[:S] = slots.at.int()
        position = (slots.base[:S] + slots.at - 1).view(1, -1, 1).expand(3, -1, -1)
        embeds = language.embed_tokens(slots.token[:S])[:, None]
        context = DecodePass(self, slots, longest_own)
        out = language(inputs_embeds=embeds, position_ids=position, use_cache=False, locus=context)
        self.choose(next_logits(self.model, out.last_hidden_state[:, 0]))

    def advance(self, at: int) -> None:
        """One step; on CUDA by the graph of this number of slots, which the second step of its kind captures
        (the first warms up)."""
        assert self.slots is not None
        if not self.is_static:
            self.step(at)
            return
        if self.slots.rows not in self.graphs:
            self.graphs[self.slots.rows] = Graph(
                lambda: self.step(None), next(iter(self.graphs.values()), None)
            )
        self.graphs[self.slots.rows]()


class DecodePass:
    """One new token of each slot attends to its group's prompt and to its own past."""

    def __init__(self, decoder: Decoder, slots: Slots, longest_own: int | None):
        self.decoder, self.slots, self.longest_own = decoder, slots, longest_own

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None
    ) -> Tensor:
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
            most_rows=slots.group_size,
            longest_own=self.longest_own,
        )
        return out[:, None]
