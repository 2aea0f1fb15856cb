"""Who computes packed attention: chosen once, by name. Every backend gives the same two functions, so the
operators do not know which it is.

forward(q, k, v, pairs, scale) -> (out [T, H, D], log-sum-exp [H, T]); backward(grad, q, k, v, out, lse,
pairs, scale) -> (dq, dk, dv). Both as in `reference.py`; in particular the backward takes the output and
log-sum-exp of a larger softmax and then gives its own keys' share.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locus_kernels.shared_prefix_attention import reference
from locus_kernels.shared_prefix_attention.layout import Bucket, Pairs

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Pairs, float], tuple[Tensor, Tensor]]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Pairs, float], tuple[Tensor, Tensor, Tensor]
    ]


def _plain() -> Backend:
    return Backend("plain", reference.forward, reference.backward)


# ---------------------------------------------------------------------------------- PyTorch's kernels, on CPU
def _torch_cpu() -> Backend:
    """FlashAttention's CPU kernels: one call for each shape of sequence, heads of a key as a batch, so no key
    is repeated."""
    forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = torch.zeros_like(q), torch.full((q.shape[1], len(q)), -torch.inf, dtype=wide)
        for b in pairs.buckets:
            part, part_lse = forward_op(*_heads(b, q, k, v), 0.0, pairs.causal, scale=scale)
            out[b.query] = _tokens(part, b.count)
            lse[:, b.query] = part_lse.unflatten(0, (b.count, -1)).permute(1, 2, 0, 3).reshape(q.shape[1], -1)
        return out, lse

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
        for b in pairs.buckets:
            qs, ks, vs = _heads(b, q, k, v)
            gs, os = (_rows(t[b.query], b.count, k.shape[1]) for t in (grad, out))
            ls = (
                lse[:, b.query]
                .reshape(k.shape[1], -1, b.count, b.query_length)
                .permute(2, 0, 1, 3)
                .flatten(0, 1)
            )
            dqs, dks, dvs = backward_op(gs, qs, ks, vs, os, ls, 0.0, pairs.causal, scale=scale)
            dq[b.query] = _tokens(dqs, b.count)
            dk[b.key], dv[b.key] = (_tokens(t.sum(1, keepdim=True), b.count) for t in (dks, dvs))
        return dq, dk, dv

    return Backend("torch", forward, backward)


def _rows(t: Tensor, count: int, key_heads: int) -> Tensor:
    """[count * length, H, D] to [count * K, H / K, length, D]; a view where count is 1."""
    length = len(t) // count
    return t.view(count, length, key_heads, -1, t.shape[-1]).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _heads(b: Bucket, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    K, per_key = k.shape[1], q.shape[1] // k.shape[1]
    keys, values = (_rows(t[b.key], b.count, K).expand(-1, per_key, -1, -1) for t in (k, v))
    return _rows(q[b.query], b.count, K), keys, values


def _tokens(t: Tensor, count: int) -> Tensor:
    """The inverse of `_rows`."""
    return t.unflatten(0, (count, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


# ------------------------------------------------------------------------------------ packed kernels, on CUDA
def _torch_cuda() -> Backend:
    """FlashAttention inside PyTorch, below `torch.nn.attention.varlen`, whose signature moves between
    versions and hides the backward."""
    aten = torch.ops.aten

    def forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor]:
        return aten._flash_attention_forward(
            q, k, v, *_extents(pairs), 0.0, pairs.causal, False, scale=scale
        )[:2]

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # of a dropout that is 0
        state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        return aten._flash_attention_backward(
            grad, q, k, v, out, lse, *_extents(pairs), 0.0, pairs.causal, state, unused, scale=scale
        )

    return Backend("torch", forward, backward)


def _extents(pairs: Pairs) -> tuple[Tensor, Tensor, int, int]:
    """Offsets and upper bounds. A bound of 1 would have FlashAttention 2 take the queries for a decoding
    step, one a sequence, which they are not."""
    return (
        pairs.queries.cu_seqlens,
        pairs.keys.cu_seqlens,
        max(2, pairs.queries.longest),
        max(2, pairs.keys.longest),
    )


def _named_extents(pairs: Pairs) -> dict[str, Any]:
    return dict(
        zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), _extents(pairs), strict=True)
    )


def _flash_attn_2() -> Backend:
    api = importlib.import_module("flash_attn.flash_attn_interface")

    def forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor]:
        return api._flash_attn_varlen_forward(
            q, k, v, **_named_extents(pairs), dropout_p=0.0, softmax_scale=scale, causal=pairs.causal
        )[:2]

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        off = {
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
            "deterministic": False,
        }
        shared = {**_named_extents(pairs), "dropout_p": 0.0, "softmax_scale": scale, "causal": pairs.causal}
        api._flash_attn_varlen_backward(grad, q, k, v, out, lse, dq, dk, dv, **shared, **off)
        return dq, dk, dv

    return Backend("flash_attn_2", forward, backward)


def _flash_attn_3() -> Backend:
    api = importlib.import_module("flash_attn_interface")
    causal_name = "is_causal" if "is_causal" in str(inspect.signature(api._flash_attn_backward)) else "causal"

    def forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor]:
        return api._flash_attn_forward(
            q, k, v, **_named_extents(pairs), softmax_scale=scale, causal=pairs.causal
        )[:2]

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        shared = {**_named_extents(pairs), "softmax_scale": scale, causal_name: pairs.causal}
        api._flash_attn_backward(grad, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **shared)
        return dq, dk, dv

    return Backend("flash_attn_3", forward, backward)


def _flash_attn_4() -> Backend:
    api = importlib.import_module("flash_attn.cute.interface")

    def forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor]:
        return api._flash_attn_fwd(
            q, k, v, **_named_extents(pairs), softmax_scale=scale, causal=pairs.causal, return_lse=True
        )[:2]

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return api._flash_attn_bwd(
            q, k, v, out, grad, lse, softmax_scale=scale, causal=pairs.causal, **_named_extents(pairs)
        )[:3]

    return Backend("flash_attn_4", forward, backward)


# ----------------------------------------------------------------------------------------------------- choice
BACKENDS: dict[
    str, tuple[str, Callable[[], Backend]]
] = {  # name -> (module that must be importable, or nothing; maker)
    "plain": ("", _plain),
    "torch": ("", _torch_cuda),
    "flash_attn_2": ("flash_attn.flash_attn_interface", _flash_attn_2),
    "flash_attn_3": ("flash_attn_interface", _flash_attn_3),
    "flash_attn_4": ("flash_attn.cute.interface", _flash_attn_4),
}
CUDA_ORDER = ("flash_attn_3", "flash_attn_2", "torch")  # "auto"; FlashAttention 4 is a beta, by name only


def choose_backend(
    name: str, device: torch.device | str, dtype: torch.dtype, head_dims: tuple[int, ...] = ()
) -> Backend:
    """The backend of this name, or the best one for "auto". Call it once, at start-up.

    auto: on CPU PyTorch's own; on CUDA FlashAttention 3 (sm_90), 2, or PyTorch's, whichever comes first, and
    the plain one for float32 and float64, which FlashAttention does not have. Raises ValueError for a name
    that is unknown, not importable, or unfit for the device, dtype or head dimensions: what was asked for by
    name is never replaced.
    """
    kind = torch.device(device).type
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention backend: expected auto or one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "auto":
        if kind != "cuda":
            return _torch_cpu()
        usable = [candidate for candidate in CUDA_ORDER if not _unfit(candidate, kind, dtype, head_dims)]
        return BACKENDS[usable[0] if usable else "plain"][1]()
    if reason := _unfit(name, kind, dtype, head_dims):
        raise ValueError(f"attention backend {name!r} cannot be used: {reason}; choose another, or auto")
    return _torch_cpu() if name == "torch" and kind == "cpu" else BACKENDS[name][1]()


def _unfit(name: str, kind: str, dtype: torch.dtype, head_dims: tuple[int, ...]) -> str:
    """Why a backend cannot run here; empty if it can."""
    module = BACKENDS[name][0]
    if module:
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            return f"its package cannot be imported ({error})"
    if name == "plain" or (name == "torch" and kind == "cpu"):
        return ""
    if kind != "cuda":
        return f"it runs on CUDA, and the device is {kind}"
    if dtype not in HALF:
        return f"it computes in bfloat16 or float16, and the model is in {str(dtype).removeprefix('torch.')}"
    if wrong := [d for d in head_dims if d > 256 or d % 8]:
        return f"it takes head dimensions of at most 256 that 8 divides, and the model has {wrong[0]}"
    if name == "flash_attn_3" and torch.cuda.get_device_capability()[0] != 9:
        return "it is made for Hopper GPUs (sm_90)"
    return ""
