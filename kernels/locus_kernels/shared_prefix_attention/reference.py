"""Attention over packed sequences that share prompts, in plain PyTorch: the oracle of every faster path, and the CPU path.

Sequences of unequal length lie one after the other in one row, with no padding; a `Ragged` holds their lengths and the index maps to a padded
block. Keys and values have `kv_heads` heads, queries `heads`, a multiple of it (grouped-query attention); no key is repeated.

Legend: S sequences, N packed tokens, H heads, K kv_heads, D head dimension, P longest prompt, B groups, G most replies of a group, L longest reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """S packed sequences. Slots of the padded block that hold no token point at token 0 and are False in `real`."""

    lengths: tuple[int, ...]
    slot_token: Tensor  # int64 [S, longest]: the packed token in each slot
    token_slot: Tensor  # int64 [N]: the flat slot of each packed token
    real: Tensor  # bool [S, longest]

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu", longest: int | None = None) -> Ragged:
        """The layout of sequences of these lengths, in this order, in a block `longest` wide (by default the longest sequence)."""
        length_S = torch.tensor(lengths, dtype=torch.int64).view(-1)
        width = max([*lengths, 0]) if longest is None else longest
        start_S = length_S.cumsum(0) - length_S
        place_L = torch.arange(width)
        real_SL = place_L < length_S[:, None]
        slot_token = torch.where(real_SL, start_S[:, None] + place_L, 0)
        sequence_N = torch.repeat_interleave(torch.arange(len(length_S)), length_S)
        token_slot = torch.arange(int(length_S.sum())) - start_S[sequence_N] + sequence_N * width
        return Ragged(tuple(lengths), slot_token.to(device), token_slot.to(device), real_SL.to(device))

    def pad(self, packed: Tensor) -> Tensor:
        """[1, H, N, D] to [S, H, longest, D]."""
        return packed[0][:, self.slot_token].transpose(0, 1)

    def pack(self, padded: Tensor) -> Tensor:
        """[S, H, longest, D] to [1, H, N, D]."""
        return padded.transpose(0, 1).flatten(1, 2)[None, :, self.token_slot]


@dataclass(frozen=True)
class SharedPrefixLayout:
    """Which prompt each reply continues. Replies are packed group by group."""

    prompts: Ragged  # every prompt of the microbatch
    groups: Tensor  # int64 [B]: the prompt of each group
    replies: Ragged  # one sequence a reply, block [B * G, L]; a group with fewer than G replies has empty ones
    mask: Tensor  # bool [B, 1, G * L, P + G * L]: what each reply slot may attend to

    @staticmethod
    def of(prompts: Ragged, groups: Sequence[int], lengths: Sequence[Sequence[int]]) -> SharedPrefixLayout:
        """lengths: the reply lengths of each group, as many groups as `groups`."""
        device = prompts.real.device
        most = max((len(group) for group in lengths), default=0)
        flat = [n for group in lengths for n in [*group, *[0] * (most - len(group))]]
        replies = Ragged.of(flat, device)
        B, L = len(groups), replies.real.shape[1]
        group_B = torch.tensor(groups, dtype=torch.int64, device=device).view(-1)
        own = torch.ones(L, L, dtype=torch.bool, device=device).tril()
        same_reply = torch.eye(most, dtype=torch.bool, device=device)
        block = (same_reply[:, None, :, None] & own[None, :, None, :]).reshape(most * L, most * L)
        to_prompt = prompts.real[group_B][:, None, None, :].expand(B, 1, most * L, -1)
        mask = torch.cat([to_prompt, block.expand(B, 1, -1, -1)], -1)
        return SharedPrefixLayout(prompts, group_B, replies, mask)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, sequences: Ragged, scale: float) -> Tensor:
    """Each packed sequence attends to itself, causally. q [1, H, N, D], k and v [1, K, N, D]; returns [1, H, N, D]."""
    q, k, v = (sequences.pad(t) for t in (q, k, v))  # padding stands behind every real query, so the causal mask hides it
    return sequences.pack(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True))


def shared_prefix_attention(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, layout: SharedPrefixLayout, scale: float) -> Tensor:
    """Each packed reply attends to all of its group's prompt and, causally, to itself.

    q [1, H, T, D], k and v [1, K, T, D] of the replies; prompt_k and prompt_v [1, K, N, D] of all prompts. Returns [1, H, T, D].
    A group's keys are read once for all of its replies, so their gradient comes out summed over the replies.
    """
    B = len(layout.groups)
    grouped = [layout.replies.pad(t).unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3) for t in (q, k, v)]  # [B, heads, G * L, D]
    keys, values = (
        torch.cat([layout.prompts.pad(prompt)[layout.groups], own], 2) for prompt, own in zip((prompt_k, prompt_v), grouped[1:], strict=True)
    )
    out = F.scaled_dot_product_attention(grouped[0], keys, values, attn_mask=layout.mask, scale=scale, enable_gqa=True)
    L = layout.replies.real.shape[1]
    return layout.replies.pack(out.unflatten(2, (-1, L)).transpose(1, 2).flatten(0, 1))


def decode_attention(q: Tensor, own_k: Tensor, own_v: Tensor, prompt_k: Tensor, prompt_v: Tensor, real: Tensor, scale: float) -> Tensor:
    """One new token a reply attends to its group's prompt and to its own past, itself included.

    q [R, H, 1, D] with R = B * G; own_k, own_v [R, K, t, D]; prompt_k, prompt_v [B, K, P, D]; real bool [B, P]. Returns [R, H, 1, D].
    """
    R, H, _, D = q.shape
    B, K, P, _ = prompt_k.shape
    q = q.view(B, R // B, K, H // K, D)
    to_prompt = torch.einsum("bgkhd,bkpd->bgkhp", q, prompt_k).masked_fill(~real[:, None, None, None], -torch.inf)
    to_own = torch.einsum("bgkhd,bgktd->bgkht", q, own_k.unflatten(0, (B, -1)))
    weight = (torch.cat([to_prompt, to_own], -1) * scale).softmax(-1)
    out = torch.einsum("bgkhp,bkpd->bgkhd", weight[..., :P], prompt_v)
    out = out + torch.einsum("bgkht,bgktd->bgkhd", weight[..., P:], own_v.unflatten(0, (B, -1)))
    return out.reshape(R, H, 1, D)


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Each packed sequence attends to all of itself (a vision tower's images or windows). q, k, v [1, H, N, D], cu_seqlens int [S + 1].

    Sequences of equal length run as one batch; returns [1, H, N, D].
    """
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    out = torch.empty_like(q)
    for length in lengths.unique().tolist():
        token = starts[lengths == length][:, None] + torch.arange(length, device=q.device)
        batch_q, batch_k, batch_v = (t[0][:, token].transpose(0, 1) for t in (q, k, v))
        out[0, :, token.flatten()] = F.scaled_dot_product_attention(batch_q, batch_k, batch_v, scale=scale).transpose(0, 1).flatten(1, 2)
    return out
