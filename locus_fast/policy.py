"""The Hugging Face model as the trainer uses it: one prefill a group, replies on the kept keys and values, log-probabilities of the replies.

The whole integration is one attention function, registered with `transformers`: the model hands it a context through a keyword, and the context
knows what to attend to (the prompts themselves, a group's prompt and the reply's own past, or one decoding step). The model is unmodified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from locus_kernels.linear_logprob import linear_logprob
from locus_kernels.shared_prefix_attention import (
    Ragged,
    SharedPrefixLayout,
    bidirectional_attention,
    causal_attention,
    decode_attention,
    shared_prefix_attention,
)
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from locus_fast.types import PromptBatch, Rollout

ATTENTION = "locus_flash"  # with "flash" in it, transformers hands the vision tower's cu_seqlens over instead of looping over images


class Attends(Protocol):
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...


@dataclass
class PromptPass:
    """Packed prompts attend to themselves; every layer's keys and values are kept, in the graph."""

    prompts: Ragged
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.kv.setdefault(layer, (k, v))  # the recomputation under activation checkpointing must not replace the tensors in the graph
        return causal_attention(q, k, v, self.prompts, scale)


@dataclass
class ReplyPass:
    """Packed replies attend to their group's prompt and to themselves."""

    layout: SharedPrefixLayout
    kv: dict[int, tuple[Tensor, Tensor]]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return shared_prefix_attention(q, k, v, *self.kv[layer], self.layout, scale)


class DecodePass:
    """One new token of each of R = B * G replies attends to its group's prompt and to its own past."""

    def __init__(self, prefix: Prefix, replies: int, max_tokens: int):
        self.real = prefix.prompts.real
        self.prompt = {layer: tuple(prefix.prompts.pad(t.detach()) for t in kv) for layer, kv in prefix.kv.items()}
        rows = len(prefix.prompts.lengths) * replies
        self.own = {layer: tuple(t.new_zeros(rows, t.shape[1], max_tokens, t.shape[3]) for t in kv) for layer, kv in self.prompt.items()}
        self.at = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        own_k, own_v = self.own[layer]
        own_k[:, :, self.at], own_v[:, :, self.at] = k[:, :, 0], v[:, :, 0]
        past = slice(0, self.at + 1)
        prompt_k, prompt_v = self.prompt[layer]
        return decode_attention(q, own_k[:, :, past], own_v[:, :, past], prompt_k, prompt_v, self.real, scale)


@dataclass(frozen=True)
class Prefix:
    """What the prompts' one forward pass leaves for their replies."""

    prompts: Ragged
    kv: dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values [1, kv_heads, N, head_dim]
    last_hidden: Tensor  # [B, D], the state that predicts each reply's first token
    next_position: Tensor  # int64 [B], the rotary position of each reply's first token


@dataclass(frozen=True)
class Replies:
    """The replies of some of a microbatch's groups, packed: T tokens to be scored, of which T_in are fed to the model (all but each last)."""

    layout: SharedPrefixLayout
    ids: Tensor  # int64 [T], every reply token
    row: Tensor  # int64 [T], the rollout row of each
    place: Tensor  # int64 [T], its place in that row
    fed: Tensor  # int64 [T_in], the place in `ids` of each token that is fed
    position: Tensor  # int64 [T_in], rotary positions of the fed tokens
    predictor: Tensor  # int64 [T], where each token's predicting state stands in cat(last_hidden [B], reply states [T_in])

    @staticmethod
    def of(prefix: Prefix, rollout: Rollout, lengths: Sequence[int], groups: Sequence[int]) -> Replies:
        """lengths: of all R rows, on the host; groups: the prompts whose replies are wanted."""
        device, G = rollout.ids.device, len(lengths) // len(prefix.prompts.lengths)
        rows = torch.tensor([r for b in groups for r in range(b * G, b * G + G)], dtype=torch.int64)
        length_R = torch.tensor(lengths, dtype=torch.int64)[rows]
        row_T = torch.repeat_interleave(rows, length_R)
        place_T = torch.arange(len(row_T)) - torch.repeat_interleave(length_R.cumsum(0) - length_R, length_R)
        is_fed = place_T < torch.repeat_interleave(length_R, length_R) - 1
        fed = is_fed.nonzero()[:, 0]
        state_T = is_fed.long().cumsum(0) - is_fed.long() + len(prefix.prompts.lengths)  # of the token itself, where it is fed
        predictor_T = torch.where(place_T == 0, row_T // G, state_T - 1)
        fed_lengths = [[lengths[r] - 1 for r in range(b * G, b * G + G)] for b in groups]
        place, row, fed_place, fed_row = (t.to(device) for t in (place_T, row_T, place_T[fed], row_T[fed]))
        return Replies(
            layout=SharedPrefixLayout.of(prefix.prompts, groups, fed_lengths),
            ids=rollout.ids[row, place],
            row=row,
            place=place,
            fed=fed.to(device),
            position=prefix.next_position[fed_row // G] + fed_place,
            predictor=predictor_T.to(device),
        )


def attention(module, q, k, v, attention_mask=None, scaling=None, dropout=0.0, locus: Attends | None = None, cu_seq_lens_q=None, **_):
    """The registered function. q, k, v [batch, heads, tokens, head_dim]; returns ([batch, tokens, heads, head_dim], None)."""
    if locus is not None:
        out = locus.attend(module.layer_idx, q, k, v, scaling)
    elif cu_seq_lens_q is not None:
        out = bidirectional_attention(q, k, v, cu_seq_lens_q, scaling)
    else:
        raise ValueError("this attention needs the trainer's context: call the model through locus_fast.policy, or set another attn_implementation")
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


def use_attention(model: Any, name: str = ATTENTION) -> None:
    """Switch every part of the model to the attention function of this name. Not through `set_attn_implementation`, which takes any name
    with "flash" in it for a package to be loaded."""
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._attn_implementation = name


def checkpoint_activations(model: Any) -> None:
    """Recompute each layer's activations in backward, and go to training mode, without which the layers do not. Non-reentrant, so that the
    remembered keys and values stay in the graph."""
    if hasattr(model, "activation_checkpointing_enable"):  # the name in newer transformers
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()


def prefill(model: Any, batch: PromptBatch) -> Prefix:
    """Vision tower and language model over the packed prompts, once a group, with whatever gradient mode is on."""
    core = model.model
    embeds = core.language_model.embed_tokens(batch.ids)
    extra: dict[str, Any] = {}
    if len(batch.grids):
        features = core.visual(batch.patches.to(core.visual.dtype), grid_thw=batch.grids, return_dict=True)
        is_image = batch.ids == model.config.image_token_id
        embeds = embeds.masked_scatter(is_image[:, None], features.pooler_output.to(embeds.dtype))
        if (deepstack := getattr(features, "deepstack_features", None)) is not None:
            extra = {"visual_pos_masks": is_image[None], "deepstack_visual_embeds": list(deepstack)}
    context = PromptPass(Ragged.of(batch.lengths, batch.ids.device))
    hidden = core.language_model(
        inputs_embeds=embeds[None], position_ids=batch.position[:, None], use_cache=False, locus=context, **extra
    ).last_hidden_state
    last = torch.tensor(batch.lengths).cumsum(0).to(batch.ids.device) - 1
    return Prefix(context.prompts, context.kv, hidden[0, last], batch.position[0, last] + 1)


def reply_hidden(model: Any, prefix: Prefix, replies: Replies) -> Tensor:
    """The states that predict each reply token, [T, D]: one forward pass over all replies on the kept keys and values."""
    if len(replies.fed) == 0:  # every reply is a single token
        return prefix.last_hidden[replies.predictor]
    position = replies.position.expand(3, 1, -1)
    context = ReplyPass(replies.layout, prefix.kv)
    embeds = model.model.language_model.embed_tokens(replies.ids[replies.fed])[None]
    hidden = model.model.language_model(inputs_embeds=embeds, position_ids=position, use_cache=False, locus=context).last_hidden_state[0]
    return torch.cat([prefix.last_hidden, hidden])[replies.predictor]


def reply_logprob(model: Any, prefix: Prefix, replies: Replies, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each reply token, float32 [T], at the sampling temperature."""
    return linear_logprob(reply_hidden(model, prefix, replies), model.lm_head.weight, replies.ids, temperature)


@torch.no_grad()
def decode(model: Any, prefix: Prefix, replies: int, max_tokens: int) -> Iterator[Tensor]:
    """A generator of logits [R, V] for the next token of `replies` replies a prompt; send it the tokens [R] that were chosen."""
    context = DecodePass(prefix, replies, max_tokens)
    hidden = prefix.last_hidden.detach().repeat_interleave(replies, 0)
    position = prefix.next_position.repeat_interleave(replies)
    for at in range(max_tokens):
        context.at = at
        tokens = yield model.lm_head(hidden)  # type: ignore[misc]
        if at + 1 < max_tokens:
            embeds = model.model.language_model.embed_tokens(tokens)[:, None]
            place = (position + at).view(1, -1, 1).expand(3, -1, -1)
            hidden = model.model.language_model(inputs_embeds=embeds, position_ids=place, use_cache=False, locus=context).last_hidden_state[:, 0]
