"""Packed attention and attention over a shared prefix, differentiable, on any backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from locus_kernels.shared_prefix_attention.backends import Backend
from locus_kernels.shared_prefix_attention.layout import Pairs, SharedPrefixLayout


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float, backend: Backend
    ) -> Tensor:
        out, lse = backend.forward(q, k, v, pairs, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = pairs, scale, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        pairs, scale, backend = ctx.rest
        return *backend.backward(grad, *ctx.saved_tensors, pairs, scale), None, None, None


class _SharedPrefix(torch.autograd.Function):
    """Two softmaxes over disjoint keys, merged by their log-sum-exp; each part's backward gets the merged
    output and log-sum-exp, which is exact (Ring Attention, arXiv 2310.01889, merges blocks the same way)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prompt_k: Tensor,
        prompt_v: Tensor,
        layout: Any,
        scale: float,
        backend: Backend,
    ) -> Tensor:
        prompt_out, prompt_lse = backend.forward(q, prompt_k, prompt_v, layout.to_prompt, scale)
        own_out, own_lse = backend.forward(q, k, v, layout.to_self, scale)
        lse = torch.logaddexp(prompt_lse, own_lse)
        share = (prompt_lse - lse).exp().T[..., None]  # [T, H, 1], of the prompt in each query's softmax
        out = torch.lerp(own_out.to(share.dtype), prompt_out.to(share.dtype), share).to(q.dtype)
        ctx.save_for_backward(q, k, v, prompt_k, prompt_v, out, lse)
        ctx.rest = layout, scale, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, prompt_k, prompt_v, out, lse = ctx.saved_tensors
        layout, scale, backend = ctx.rest
        to_prompt, prompt_dk, prompt_dv = backend.backward(
            grad, q, prompt_k, prompt_v, out, lse, layout.to_prompt, scale
        )
        to_self, dk, dv = backend.backward(grad, q, k, v, out, lse, layout.to_self, scale)
        return to_prompt + to_self, dk, dv, prompt_dk, prompt_dv, None, None, None


def _check(q: Tensor, queries: int, keys: dict[str, tuple[Tensor, int]]) -> None:
    if q.ndim != 3 or len(q) != queries:
        raise ValueError(
            f"q: expected [{queries}, heads, head_dim], the tokens of its layout, got {list(q.shape)}"
        )
    for name, (tensor, tokens) in keys.items():
        if (
            tensor.ndim != 3
            or len(tensor) != tokens
            or tensor.shape[2] != q.shape[2]
            or q.shape[1] % max(1, tensor.shape[1])
        ):
            fits = f"[{tokens}, a divisor of {q.shape[1]}, {q.shape[2]}]"
            raise ValueError(
                f"{name}: expected {fits}, key tokens, key heads and head dimension, got {list(tensor.shape)}"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name}: expected {q.dtype} on {q.device} as q is, got {tensor.dtype} on {tensor.device}"
            )


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, *, scale: float, backend: Backend
) -> Tensor:
    """Softmax attention of each query sequence to its key sequence: [T, H, D], of q's dtype.

    q [T, H, D], k and v [N, K, D], H a multiple of K, packed as `pairs` says; the last dimension contiguous,
    otherwise any strides.
    Self-attention is a `Pairs` of one `Packed` with itself. Scores are multiplied by `scale` (usually
    head_dim ** -0.5).
    Gradients flow to q, k and v. Raises ValueError for shapes that do not fit the layout, or unequal dtypes
    or devices.
    """
    _check(q, pairs.queries.tokens, {"k": (k, pairs.keys.tokens), "v": (v, pairs.keys.tokens)})
    return _Packed.apply(q, k, v, pairs, scale, backend)


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    layout: SharedPrefixLayout,
    *,
    scale: float,
    backend: Backend,
) -> Tensor:
    """Each packed reply attends to all of its group's prompt and, causally, to itself, in one softmax: [T, H,
    D], of q's dtype.

    q [T, H, D], k and v [T, K, D] of the replies; prompt_k and prompt_v [N, K, D] of all prompts; H a
    multiple of K, the last dimension contiguous. All reply tokens of a group are one query sequence to its
    prompt: the prompt's keys are read once a group, never repeated, and their gradient comes out summed over
    the replies. Gradients flow to all five tensors.
    Raises ValueError for shapes that do not fit the layout, or unequal dtypes or devices.
    """
    tokens, prompt_tokens = layout.to_self.keys.tokens, layout.to_prompt.keys.tokens
    keys = {
        "k": (k, tokens),
        "v": (v, tokens),
        "prompt_k": (prompt_k, prompt_tokens),
        "prompt_v": (prompt_v, prompt_tokens),
    }
    _check(q, tokens, keys)
    return _SharedPrefix.apply(q, k, v, prompt_k, prompt_v, layout, scale, backend)
