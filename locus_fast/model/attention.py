"""The one attention function that `transformers` calls, and what it attends to.

The model hands the function a context through a keyword, and the context knows what its queries attend to: an
image's patches to themselves, prompts to themselves, a group's replies to their prompt and to their own past,
or one decoding step (`step.rollout.DecodePass`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from types import MethodType
from typing import Any, Protocol

import torch
from locus_kernels.shared_prefix_attention import (
    BACKENDS,
    Backend,
    Pairs,
    SharedPrefixLayout,
    choose_backend,
    packed_attention,
    shared_prefix_attention,
)
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from locus_fast.model.fused import can_fuse, fuse, unfuse
from locus_fast.model.packing import VisionLayout

# With "flash" in its name, transformers hands the vision tower's cu_seqlens over instead of looping over
# images. The rest of the name is that of the backend, so that the model's config says who computes its
# attention.
PREFIX = "locus_flash_"


class Attends(Protocol):
    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None
    ) -> Tensor:
        """q [batch, H, tokens, D], k and v [batch, K, tokens, D] of one layer; returns [batch, tokens, H,
        D]."""


def rows_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[1, heads, tokens, D] to [tokens, heads, D], views."""
    return q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1)


@dataclass
class VisionPass:
    """Packed images or windows attend to themselves."""

    layout: VisionLayout
    backend: Backend

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None
    ) -> Tensor:
        assert cu_seqlens is not None
        q, k, v = rows_first(q, k, v)
        return packed_attention(q, k, v, self.layout.pairs(cu_seqlens), scale=scale, backend=self.backend)[
            None
        ]


@dataclass
class PromptPass:
    """Packed prompts attend to themselves; every layer's keys and values are kept, in the graph."""

    pairs: Pairs
    backend: Backend
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None
    ) -> Tensor:
        q, k, v = rows_first(q, k, v)
        # the recomputation under checkpointing must not replace the tensors in the graph
        self.kv.setdefault(module.layer_idx, (k, v))
        return packed_attention(q, k, v, self.pairs, scale=scale, backend=self.backend)[None]


@dataclass
class ReplyPass:
    """Packed replies attend to their group's prompt and to themselves."""

    layout: SharedPrefixLayout
    backend: Backend
    kv: dict[int, tuple[Tensor, Tensor]]

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None
    ) -> Tensor:
        q, k, v = rows_first(q, k, v)
        prompt_k, prompt_v = self.kv[module.layer_idx]
        return shared_prefix_attention(
            q, k, v, prompt_k, prompt_v, self.layout, scale=scale, backend=self.backend
        )[None]


def attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    locus: Attends | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The registered function. q, k, v [batch, heads, tokens, head_dim]; returns ([batch, tokens, heads,
    head_dim], None). Raises ValueError for a model that is called otherwise than through
    `locus_fast.model.policy`."""
    if locus is None or scaling is None:
        raise ValueError(
            "this attention needs the trainer's context: call the model through locus_fast.model.policy, or "
            "set another attn_implementation"
        )
    return locus.attend(module, q, k, v, scaling, cu_seq_lens_q), None


for _name in ("auto", *BACKENDS):
    ALL_ATTENTION_FUNCTIONS.register(PREFIX + _name, attention)


def backend_of(model: Any) -> Backend:
    """Who computes the model's attention, by the name in its config. Raises ValueError as `choose_backend`
    does."""
    name = model.config._attn_implementation
    if not name.startswith(PREFIX):
        raise ValueError(f"the model's attention is {name}: call use_attention first")
    vision, text = model.config.vision_config, model.config.text_config
    own = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dimensions = (own, vision.hidden_size // vision.num_heads)
    return _chosen(name.removeprefix(PREFIX), str(model.device), model.dtype, dimensions)


@lru_cache(maxsize=64)
def _chosen(name: str, device: str, dtype: torch.dtype, dimensions: tuple[int, ...]) -> Backend:
    return choose_backend(name, torch.device(device), dtype, dimensions)


def add_deep_features(hidden: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """hidden [1, N, D] with features [M, D] added at places int64 [M]: DeepStack's addition by index, since a
    boolean mask must be read back."""
    return hidden.index_add(1, places, features[None].to(hidden.dtype))


def embed_patches(embed: Any, patches: Tensor) -> Tensor:
    """A vision tower's patch embedding, [N, D] of patches [N, values], as the matrix product that its
    convolution is: a kernel as large as a patch meets each patch once. cuDNN would round a float32
    convolution's inputs to TF32."""
    weight = embed.proj.weight
    return torch.nn.functional.linear(patches.to(weight.dtype), weight.flatten(1), embed.proj.bias)


def use_attention(model: Any, backend: str = "auto") -> None:
    """Switch every part of the model to our attention, computed by `backend` (see `choose_backend`, whose
    ValueError this raises), beside liger-kernel's operators where the device has them (`model.fused`)."""
    use_plain_attention(model, PREFIX + backend)
    backend_of(model)
    language, embed = model.model.language_model, model.model.visual.patch_embed
    embed.forward = MethodType(embed_patches, embed)
    if hasattr(language, "_deepstack_process"):
        language._deepstack_process = add_deep_features
    if can_fuse(model.device):
        fuse(model)


def use_plain_attention(model: Any, name: str) -> None:
    """Switch every part of the model to an attention function of `transformers`, and its modules to their own
    `forward`. Not through `set_attn_implementation`, which takes any name with "flash" in it for a package.
    """
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._attn_implementation = name
    vars(model.model.language_model).pop("_deepstack_process", None)
    vars(model.model.visual.patch_embed).pop("forward", None)
    unfuse(model)
