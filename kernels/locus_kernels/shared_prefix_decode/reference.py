"""One decoding step over shared prompts, in plain PyTorch: the oracle of the kernel and the CPU path. No key
is repeated for a reply or a head.

out[r, h] = sum_j softmax_j(scale q[r, h] . k_j) v_j over the keys j of key head h // (H / K): those of row
r's prompt, then the row's own.

Legend: R rows, B prompts, N packed prompt tokens, H heads, K key heads, S = H / K, D head dimension, P tokens
of a prompt, G rows of a group, T most tokens of a row's own past.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Keys of a prompt, in elements, up to which a copy of them costs less than a batch of their own
SHORT = 2**15


class Inputs(NamedTuple):
    """The tensors of a step, as `op.shared_prefix_decode` documents them."""

    q: Tensor  # [R, H, D]
    prompt_k: Tensor  # [N, K, D]
    prompt_v: Tensor
    cu_prompts: Tensor  # int32 [B + 1]
    own_k: Tensor  # [R, K, L, D]
    own_v: Tensor
    own_lengths: Tensor  # int32 [R]
    cu_rows: Tensor  # int32 [B + 1]


class Bounds(NamedTuple):
    """Upper bounds, on the host, of what the offsets and lengths on the device say."""

    longest_prompt: int  # tokens of a prompt
    most_rows: int  # rows of a group
    longest_own: int  # tokens of a row's own past


def _attend(query: Tensor, own: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """B prompts of P tokens, one after the other in k and v [B * P, K, D], of which those in hidden, bool [B,
    P], do not count, and G rows of each: scaled query [B, G, K, S, D] and scores against the rows' own keys,
    own [B, G, K, S, T]. Returns the prompts' part of the output [B, G, K, S, D] and the weights of own [B, G,
    K, S, T]."""
    B, G, K, S, _ = query.shape
    P = k.shape[0] // B
    k, v = (x.unflatten(0, (B, P)).permute(2, 0, 1, 3).flatten(0, 1) for x in (k, v))  # [K * B, P, D]
    query, own = (x.permute(2, 0, 1, 3, 4).reshape(K * B, G * S, x.shape[-1]) for x in (query, own))
    scores = torch.bmm(query, k.transpose(1, 2))
    if hidden is not None:
        scores.view(K, B, G * S, P).masked_fill_(hidden[:, None], -torch.inf)
    weight = torch.cat([scores, own], -1).softmax(-1)
    if not P:
        weight = weight.masked_fill(own == -torch.inf, 0)  # a row without any key
    both = (torch.bmm(weight[..., :P], v), weight[..., P:])
    part, rest = (x.view(K, B, G, S, -1).permute(1, 2, 0, 3, 4) for x in both)
    return part, rest


def _attend_ragged(
    query: Tensor, own: Tensor, k: Tensor, v: Tensor, counts: list[int], hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`_attend` for counts[b] rows of prompt b, packed: query, own and results [rows, K, S, ...]. Repeats
    queries up to the largest count."""
    B, G = len(counts), max(counts)
    if min(counts) == G:
        part, weight = _attend(query.unflatten(0, (B, G)), own.unflatten(0, (B, G)), k, v, hidden)
        return part.flatten(0, 1), weight.flatten(0, 1)
    real_BG = torch.arange(G) < torch.tensor(counts)[:, None]
    row_BG = (real_BG.flatten().cumsum(0) - 1).clamp(min=0).view(B, G)
    part, weight = _attend(query[row_BG], own[row_BG], k, v, hidden)
    return part[real_BG], weight[real_BG]


def _attend_prompts(
    query: Tensor, own: Tensor, k: Tensor, v: Tensor, prompts: list[int], rows: list[int]
) -> tuple[Tensor, Tensor]:
    """`_attend_ragged` over packed prompts of any lengths, k and v [N, K, D]."""
    sizes, counts = ([b - a for a, b in pairwise(offsets)] for offsets in (prompts, rows))
    (_, K, D), longest, dtype = k.shape, max(sizes), query.dtype
    k, v = k[prompts[0] : prompts[-1]], v[prompts[0] : prompts[-1]]
    if longest == min(sizes) and (K == 1 or all(x.stride(1) == x.shape[0] * x.stride(0) for x in (k, v))):
        # key heads and prompts are one batch dimension without a copy
        return _attend_ragged(query, own, k.to(dtype), v.to(dtype), counts)
    if min(sizes) > 0 and longest * K * D <= SHORT:
        size_B, place_P = torch.tensor(sizes)[:, None], torch.arange(longest)
        start_B = torch.tensor(prompts[:-1])[:, None] - prompts[0]
        token = (start_B + torch.minimum(place_P, size_B - 1)).flatten()
        k, v = (x.transpose(0, 1).index_select(1, token).transpose(0, 1).to(dtype) for x in (k, v))
        return _attend_ragged(query, own, k, v, counts, place_P >= size_B)
    parts = []
    for b, count in enumerate(counts):
        if count:
            at = slice(rows[b], rows[b + 1])
            tokens = slice(prompts[b] - prompts[0], prompts[b + 1] - prompts[0])
            keys, values = k[tokens].to(dtype), v[tokens].to(dtype)
            parts.append(_attend_ragged(query[at], own[at], keys, values, [count]))
    part, weight = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return part, weight


def _check_values(
    prompts: list[int], lengths: list[int], rows: list[int], tokens: int, bounds: Bounds
) -> None:
    for name, offsets, limit, most in (
        ("cu_prompts", prompts, tokens, bounds.longest_prompt),
        ("cu_rows", rows, len(lengths), bounds.most_rows),
    ):
        steps = [b - a for a, b in pairwise(offsets)]
        if offsets[0] < 0 or offsets[-1] > limit or min(steps, default=0) < 0 or max(steps, default=0) > most:
            expected = f"ascending offsets within 0 to {limit} in steps of at most {most}"
            raise ValueError(f"{name}: expected {expected}, got {offsets}")
    if rows[0] != 0:
        raise ValueError(f"cu_rows: expected 0 first, got {rows[0]}")
    used = lengths[: rows[-1]]
    if used and not 0 <= min(used) <= max(used) <= bounds.longest_own:
        expected = f"0 to longest_own = {bounds.longest_own}"
        raise ValueError(f"own_lengths: expected {expected}, got {min(used)} to {max(used)}")


def shared_prefix_decode(inputs: Inputs, scale: float, bounds: Bounds) -> Tensor:
    """What `op.shared_prefix_decode` documents, computed in float32 (float64 for float64). Reads the offsets
    and lengths: for CPU tensors.

    Prompts of equal length in [K, N, D] storage run as one batch in place, short ones of other lengths as one
    padded copy, long ones one by one in place: whatever the number of rows, a prompt's keys are read once.
    """
    q, prompt_k, prompt_v, cu_prompts, own_k, own_v, own_lengths, cu_rows = inputs
    prompts, lengths, rows = cu_prompts.tolist(), own_lengths.tolist(), cu_rows.tolist()
    _check_values(prompts, lengths, rows, prompt_k.shape[0], bounds)
    out, used = q.new_zeros(q.shape), rows[-1]
    if not used:
        return out
    K, T, dtype = prompt_k.shape[1], max(lengths[:used]), torch.promote_types(q.dtype, torch.float32)
    query = (q[:used].to(dtype) * scale).unflatten(1, (K, -1))
    k, v = (x[:used, :, :T].to(dtype) for x in (own_k, own_v))
    own = query @ k.transpose(2, 3)
    if min(lengths[:used]) < T:
        unreal = torch.arange(T) >= own_lengths[:used, None]
        own = own.masked_fill(unreal[:, None, None], -torch.inf)
        v = v.masked_fill(unreal[:, None, :, None], 0)  # unused slots may hold NaN
    part, weight = _attend_prompts(query, own, prompt_k, prompt_v, prompts, rows)
    out[:used] = (part + weight @ v).flatten(1, 2)
    return out
