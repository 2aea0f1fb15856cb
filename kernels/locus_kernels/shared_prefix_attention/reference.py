"""Attention over packed sequences in plain PyTorch, by its definition: the oracle of every backend.

Legend: T packed query tokens, N packed key tokens, H query heads, K key heads (H a multiple of K:
grouped-query attention), D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from locus_kernels.shared_prefix_attention.layout import Pairs, SharedPrefixLayout


def scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """Scaled scores of one pair, [K, H / K, queries, keys], -inf where a query may not look. q [queries, H,
    D], k [keys, K, D]."""
    out = torch.einsum("qkhd,pkd->khqp", q.unflatten(1, (k.shape[1], -1)), k) * scale
    return (
        out.masked_fill(~torch.ones(out.shape[-2:], dtype=torch.bool, device=q.device).tril(), -torch.inf)
        if causal
        else out
    )


def forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor]:
    """(out [T, H, D], log-sum-exp of the scores [H, T]). q [T, H, D], k and v [N, K, D]. Queries without
    keys: 0 and -inf."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], len(q)), -torch.inf, dtype=wide, device=q.device)
    for query, key in _slices(pairs):
        s = scores(q[query].to(wide), k[key].to(wide), scale, pairs.causal)
        out[query] = torch.einsum("khqp,pkd->qkhd", s.softmax(-1), v[key].to(wide)).flatten(1, 2).to(q.dtype)
        lse[:, query] = s.logsumexp(-1).flatten(0, 1)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv). `out` and `lse` may be those of a softmax over more keys than these (FlashAttention,
    arXiv 2205.14135, section B.2, with P = exp(scores - lse) and the row sum of grad * out): then these are
    this part's share of the gradient."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    for query, key in _slices(pairs):
        heads = (k.shape[1], -1)
        qs, gs, os = (t[query].to(wide).unflatten(1, heads) for t in (q, grad, out))
        ks, vs = k[key].to(wide), v[key].to(wide)
        p = (
            scores(q[query].to(wide), ks, scale, pairs.causal) - lse[:, query].unflatten(0, heads)[..., None]
        ).exp()
        ds = (
            p
            * (torch.einsum("qkhd,pkd->khqp", gs, vs) - (gs * os).sum(-1).permute(1, 2, 0)[..., None])
            * scale
        )
        dq[query] = torch.einsum("khqp,pkd->qkhd", ds, ks).flatten(1, 2).to(q.dtype)
        dk[key] = torch.einsum("khqp,qkhd->pkd", ds, qs).to(k.dtype)
        dv[key] = torch.einsum("khqp,qkhd->pkd", p, gs).to(v.dtype)
    return dq, dk, dv


def _slices(pairs: Pairs) -> Iterator[tuple[slice, slice]]:
    """Where the query and the key sequence of each pair lie."""
    for i in range(len(pairs.queries.lengths)):
        query, key = (slice(side.starts[i], side.starts[i + 1]) for side in (pairs.queries, pairs.keys))
        yield query, key


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    layout: SharedPrefixLayout,
    scale: float,
) -> Tensor:
    """Each reply against cat(its prompt, itself), one softmax, one reply at a time; differentiable, any
    floating dtype."""
    out = []
    replies, prompts = layout.to_self.queries, layout.to_prompt.keys
    ends = layout.to_prompt.queries.starts[1:]
    for i, length in enumerate(replies.lengths):
        if not length:
            continue
        at = slice(replies.starts[i], replies.starts[i + 1])
        group = next(b for b, end in enumerate(ends) if at.start < end)
        prompt = slice(prompts.starts[group], prompts.starts[group + 1])
        s = torch.cat(
            [scores(q[at], prompt_k[prompt], scale, causal=False), scores(q[at], k[at], scale, causal=True)],
            -1,
        )
        out.append(
            torch.einsum("khqp,pkd->qkhd", s.softmax(-1), torch.cat([prompt_v[prompt], v[at]])).flatten(1, 2)
        )
    return torch.cat(out) if out else q.clone()
