"""Stand-ins for the FlashAttention packages, with their published signatures."""

from __future__ import annotations

import types

import torch
from locus_kernels.shared_prefix_attention import Packed, Pairs, reference
from torch import Tensor


class Recorder:
    """Makes the stand-ins, computed by the plain backend, and notes who was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pairs(self, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool) -> Pairs:
        queries, keys = (Packed(tuple(cu.diff().tolist()), cu) for cu in (cu_q, cu_k))
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (max_q, max_k) == (max(2, queries.longest), max(2, keys.longest))
        return Pairs(queries, keys, causal)

    def two(self) -> types.SimpleNamespace:
        def _flash_attn_varlen_forward(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            dropout_p,
            softmax_scale,
            causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
        ):
            self.calls.append("forward")
            out, lse = reference.forward(
                q,
                k,
                v,
                self.pairs(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal),
                softmax_scale,
            )
            return out, lse, torch.empty(0), torch.empty(2)

        def _flash_attn_varlen_backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            dq,
            dk,
            dv,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            dropout_p,
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            alibi_slopes,
            deterministic,
            rng_state=None,
        ):
            self.calls.append("backward")
            pairs = self.pairs(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
            for given, value in zip(
                (dq, dk, dv),
                reference.backward(dout, q, k, v, out, softmax_lse, pairs, softmax_scale),
                strict=True,
            ):
                given.copy_(value)
            return torch.empty(0)

        return types.SimpleNamespace(**locals())

    def three(self) -> types.SimpleNamespace:
        two = self.two()

        def _flash_attn_forward(
            q,
            k,
            v,
            k_new=None,
            v_new=None,
            qv=None,
            out_=None,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            cu_seqlens_k_new=None,
            seqused_q=None,
            seqused_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            softmax_scale=None,
            causal=False,
        ):
            return two._flash_attn_varlen_forward(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal
            )

        def _flash_attn_backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            sequed_q=None,
            sequed_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            dq=None,
            dk=None,
            dv=None,
            softmax_scale=None,
            is_causal=False,
        ):
            where = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            return two._flash_attn_varlen_backward(
                dout,
                q,
                k,
                v,
                out,
                softmax_lse,
                dq,
                dk,
                dv,
                *where,
                0.0,
                softmax_scale,
                is_causal,
                -1,
                -1,
                0.0,
                None,
                False,
            )

        return types.SimpleNamespace(**locals())

    def four(self) -> types.SimpleNamespace:
        def _flash_attn_fwd(
            q,
            k,
            v,
            qv=None,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            seqused_q=None,
            seqused_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            softmax_scale=None,
            causal=False,
            return_lse=False,
        ):
            assert return_lse
            return (
                *self.two()._flash_attn_varlen_forward(
                    q,
                    k,
                    v,
                    cu_seqlens_q,
                    cu_seqlens_k,
                    max_seqlen_q,
                    max_seqlen_k,
                    0.0,
                    softmax_scale,
                    causal,
                )[:2],
                None,
                None,
                None,
            )

        def _flash_attn_bwd(
            q,
            k,
            v,
            out,
            dout,
            lse,
            softmax_scale=None,
            causal=False,
            softcap=0.0,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            deterministic=False,
        ):
            self.calls.append("backward")
            pairs = self.pairs(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
            return reference.backward(dout, q, k, v, out, lse, pairs, softmax_scale)

        return types.SimpleNamespace(**locals())
