"""liger-kernel's RMSNorm, SwiGLU and rotary embedding in a Hugging Face model: one kernel each where its own
modules start eight, two and eleven.

The modules stay what they are, with their parameters and names; only `forward` is set, on each instance that
has a fused counterpart. The kernels are Triton's: models on CUDA have them where liger-kernel is installed,
models on the CPU keep their own forward.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN


def can_fuse(device: torch.device) -> bool:
    """Whether models on this device run liger-kernel's operators."""
    return device.type == "cuda" and find_spec("liger_kernel") is not None


def fuse(model: Any) -> None:
    """Give the RMSNorms, the SwiGLUs and the attentions' rotations of a model to liger-kernel. The attentions
    then need the trainer's context."""
    for module in model.model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(rms_norm, module)
        elif hasattr(module, "gate_proj") and isinstance(module.act_fn, type(ACT2FN["silu"])):
            module.forward = MethodType(swiglu, module)
    for layer in model.model.language_model.layers:
        layer.self_attn.forward = MethodType(text_attention, layer.self_attn)
    for block in model.model.visual.blocks:
        block.attn.forward = MethodType(vision_attention, block.attn)


def unfuse(model: Any) -> None:
    """Give every module its own forward back."""
    for module in model.model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in FORWARDS:
            del module.forward


def rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    """hidden [..., D], of any float dtype; rounded where the module rounds. Its gradient is a new tensor, as
    others may read what it is made of."""
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(hidden, norm.weight, norm.variance_epsilon, in_place=False)


def swiglu(mlp: Any, hidden: Tensor) -> Tensor:
    """hidden [..., D]. Backward writes over the kept gate and up projections, so it runs once."""
    from liger_kernel.transformers.functional import liger_swiglu

    return mlp.down_proj(liger_swiglu(mlp.gate_proj(hidden), mlp.up_proj(hidden)))


def text_attention(
    attention: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], locus: Any, **_: Any
) -> tuple[Tensor, None]:
    """hidden_states [batch, tokens, D]; position_embeddings: cosines and sines [batch, tokens, head_dim];
    locus: the trainer's context."""
    from liger_kernel.transformers.functional import liger_rope

    heads = (*hidden_states.shape[:-1], -1, attention.head_dim)
    q, k, v = (
        project(hidden_states).view(heads)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = liger_rope(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
    return attention.o_proj(
        locus.attend(attention, q, k, v.transpose(1, 2), attention.scaling, None).flatten(-2)
    ), None


def vision_attention(
    attention: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    locus: Any,
    **_: Any,
) -> Tensor:
    """hidden_states [patches, D]; cu_seqlens of images or windows; position_embeddings: cosines and sines
    float32 [patches, head_dim]."""
    from liger_kernel.transformers.functional import liger_rope

    rows = attention.qkv(hidden_states).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = rows.permute(1, 2, 0, 3)[:, None]  # each [1, heads, patches, head_dim]
    q, k = liger_rope(q, k, *(x[None] for x in position_embeddings))
    return attention.proj(locus.attend(attention, q, k, v, attention.scaling, cu_seqlens)[0].flatten(-2))


FORWARDS = (rms_norm, swiglu, text_attention, vision_attention)
