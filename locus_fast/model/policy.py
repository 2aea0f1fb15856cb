"""The Hugging Face model as the trainer uses it: one prefill a group, replies on the kept keys and values, log-probabilities of the replies.

The whole integration is one attention function, registered with `transformers`: the model hands it a context through a keyword, and the context
knows what to attend to (images, the prompts themselves, a group's prompt and the reply's own past, or one decoding step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, Protocol

import torch
from locus_kernels.linear_logprob import linear_logprob
from locus_kernels.shared_prefix_attention import Backend, Pairs, SharedPrefixLayout, choose_backend, packed_attention, shared_prefix_attention
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from locus_fast.model.fused import can_fuse, fuse, unfuse
from locus_fast.model.packing import PromptBatch, Replies, VisionLayout

HEAD_ROWS = 8192  # of the head that a CPU holds in float32 at a time
ATTENTION = "locus_flash"  # with "flash" in it, transformers hands the vision tower's cu_seqlens over instead of looping over images


class Attends(Protocol):
    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None) -> Tensor:
        """q [batch, H, tokens, D], k and v [batch, K, tokens, D] of one layer; returns [batch, tokens, H, D]."""


def rows_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[1, heads, tokens, D] to [tokens, heads, D], views."""
    return q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1)


@dataclass
class VisionPass:
    """Packed images or windows attend to themselves."""

    layout: VisionLayout
    backend: Backend

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None) -> Tensor:
        assert cu_seqlens is not None
        q, k, v = rows_first(q, k, v)
        return packed_attention(q, k, v, self.layout.pairs(cu_seqlens), scale=scale, backend=self.backend)[None]


@dataclass
class PromptPass:
    """Packed prompts attend to themselves; every layer's keys and values are kept, in the graph."""

    pairs: Pairs
    backend: Backend
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None) -> Tensor:
        q, k, v = rows_first(q, k, v)
        self.kv.setdefault(module.layer_idx, (k, v))  # the recomputation under checkpointing must not replace the tensors in the graph
        return packed_attention(q, k, v, self.pairs, scale=scale, backend=self.backend)[None]


@dataclass
class ReplyPass:
    """Packed replies attend to their group's prompt and to themselves."""

    layout: SharedPrefixLayout
    backend: Backend
    kv: dict[int, tuple[Tensor, Tensor]]

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None) -> Tensor:
        q, k, v = rows_first(q, k, v)
        prompt_k, prompt_v = self.kv[module.layer_idx]
        return shared_prefix_attention(q, k, v, prompt_k, prompt_v, self.layout, scale=scale, backend=self.backend)[None]


@dataclass(frozen=True)
class Features:
    """What the vision tower makes of a batch's images; None where it has none."""

    image: Tensor | None  # [M, D]
    deep: list[Tensor] | None  # [M, D] for each of the first language layers (DeepStack), or None


@dataclass(frozen=True)
class Prefix:
    """What the prompts' one forward pass leaves for their replies."""

    batch: PromptBatch
    features: Features
    kv: dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values [N, kv_heads, head_dim]
    last_hidden: Tensor  # [B, D], the state that predicts each reply's first token


def attention(module, q, k, v, attention_mask=None, scaling=None, dropout=0.0, locus: Attends | None = None, cu_seq_lens_q=None, **_):
    """The registered function. q, k, v [batch, heads, tokens, head_dim]; returns ([batch, tokens, heads, head_dim], None)."""
    if locus is None:
        raise ValueError("this attention needs the trainer's context: call the model through locus_fast.policy, or set another attn_implementation")
    return locus.attend(module, q, k, v, scaling, cu_seq_lens_q), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


def add_deep_features(hidden: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """hidden [1, N, D] with features [M, D] added at places int64 [M]: DeepStack's addition by index, since a boolean mask must be read back."""
    return hidden.index_add(1, places, features[None].to(hidden.dtype))


def embed_patches(embed: Any, patches: Tensor) -> Tensor:
    """A vision tower's patch embedding, [N, D] of patches [N, values], as the matrix product that its convolution is:
    a kernel as large as a patch meets each patch once. cuDNN would round a float32 convolution's inputs to TF32."""
    weight = embed.proj.weight
    return torch.nn.functional.linear(patches.to(weight.dtype), weight.flatten(1), embed.proj.bias)


def use_attention(model: Any, name: str = ATTENTION, backend: str = "auto") -> None:
    """Switch every part of the model to the attention function of this name; with the trainer's own, computed by `backend` (see `choose_backend`,
    whose ValueError this raises), beside liger-kernel's operators where the device has them (locus_fast.fused). Not through
    `set_attn_implementation`, which takes any name with "flash" in it for a package to be loaded."""
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._attn_implementation = name
    language = model.model.language_model
    vars(language).pop("_deepstack_process", None)
    unfuse(model)
    embed = model.model.visual.patch_embed
    vars(embed).pop("forward", None)
    if name == ATTENTION:
        vision, text = model.config.vision_config, model.config.text_config
        own = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        model.locus_backend = choose_backend(backend, model.device, model.dtype, (own, vision.hidden_size // vision.num_heads))
        embed.forward = MethodType(embed_patches, embed)
        if hasattr(language, "_deepstack_process"):
            language._deepstack_process = add_deep_features
        if can_fuse(model.device):
            fuse(model)


def checkpoint_activations(model: Any, every: int = 1) -> None:
    """Recompute the activations of every `every`-th block of the vision tower and layer of the language model in backward, the first of each
    included, and go to training mode, without which they do not. Non-reentrant, so that the remembered keys and values stay in the graph."""
    options = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout, and the random state is read back
    if hasattr(model, "activation_checkpointing_enable"):  # the name in newer transformers
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
    model.disable_input_require_grads()  # or a frozen tower's patches would have a backward, and a frozen embedding's tokens
    for layers in (model.model.visual.blocks, model.model.language_model.layers):
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = index % every == 0
    model.train()


def trains_vision(model: Any) -> bool:
    """Whether anything of the vision tower is trained."""
    return any(p.requires_grad for p in model.model.visual.parameters())


def see(model: Any, patches: Tensor, grids: Tensor, layout: VisionLayout | None) -> Features:
    """The vision tower over packed images, each once; without a gradient where all of it is frozen. grids on the host."""
    if layout is None:
        return Features(None, None)
    visual, context = model.model.visual, VisionPass(layout, model.locus_backend)
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains_vision(model)):
        out = visual(patches.to(visual.dtype), grid_thw=grids, return_dict=True, locus=context, **layout.keywords)
    return Features(out.pooler_output, getattr(out, "deepstack_features", None))


def prefill(model: Any, batch: PromptBatch, features: Features | None = None) -> Prefix:
    """Vision tower and language model over the packed prompts, once a group, with whatever gradient mode is on.

    features: the vision tower's, where they are known already (a reference that shares a frozen tower).
    """
    features = see(model, batch.patches, batch.grids, batch.vision) if features is None else features
    language = model.model.language_model
    embeds = language.embed_tokens(batch.ids)
    extra: dict[str, Any] = {}
    if features.image is not None:
        embeds = embeds.index_copy(0, batch.image_place, features.image.to(embeds.dtype))
    if features.deep is not None:
        extra = {"visual_pos_masks": batch.image_place, "deepstack_visual_embeds": list(features.deep)}
    context = PromptPass(batch.pairs, model.locus_backend)
    hidden = language(inputs_embeds=embeds[None], position_ids=batch.position[:, None], use_cache=False, locus=context, **extra).last_hidden_state
    return Prefix(batch, features, context.kv, hidden[0, batch.last])


def cut(prefix: Prefix) -> tuple[Prefix, Callable[[], None]]:
    """(the prefix to compute replies on, what takes its gradient on through the prompts when the replies' backward has run).

    One backward through both would hold every weight's gradient of the replies' pass until the prompts' pass adds its own: as much memory as the
    language model's gradients. Cut in two, each is added to the gradients that are there at once. The given prefix should not be used any more.
    """
    ends = [t for pair in prefix.kv.values() for t in pair] + [prefix.last_hidden]
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in ends]
    kv = {layer: (leaves[2 * i], leaves[2 * i + 1]) for i, layer in enumerate(prefix.kv)}

    def onward() -> None:
        reached = [(end, leaf.grad) for end, leaf in zip(ends, leaves, strict=True) if leaf.grad is not None]
        ends.clear()
        leaves.clear()
        torch.autograd.backward([end for end, _ in reached], [gradient for _, gradient in reached])

    return replace(prefix, kv=kv, last_hidden=leaves[-1]), onward


def next_logits(model: Any, hidden: Tensor) -> Tensor:
    """The head's logits, float32 [S, V], of states [S, D] in the model's dtype: never rounded to it, as the training
    forward's are not, so that sampler and trainer agree on the log-probs of equal states."""
    weight = model.lm_head.weight
    if weight.dtype == torch.float32:
        return torch.nn.functional.linear(hidden, weight)
    if hidden.device.type == "cpu":  # which has no product of low precision with a float32 result
        return torch.cat([hidden.float() @ part.float().T for part in weight.split(HEAD_ROWS)], 1)
    return torch.mm(hidden, weight.T, out_dtype=torch.float32)


def reply_hidden(model: Any, prefix: Prefix, replies: Replies) -> Tensor:
    """The states that predict each reply token, [T, D]: one forward pass over all replies on the kept keys and values."""
    if len(replies.fed) == 0:  # every reply is a single token
        return prefix.last_hidden[replies.predictor]
    context = ReplyPass(replies.layout, model.locus_backend, prefix.kv)
    language = model.model.language_model
    embeds = language.embed_tokens(replies.ids[replies.fed])[None]
    position = replies.position.expand(3, 1, -1)
    hidden = language(inputs_embeds=embeds, position_ids=position, use_cache=False, locus=context).last_hidden_state[0]
    return torch.cat([prefix.last_hidden, hidden])[replies.predictor]


def reply_logprob(model: Any, prefix: Prefix, replies: Replies, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each reply token, float32 [T], at the sampling temperature."""
    return linear_logprob(reply_hidden(model, prefix, replies), model.lm_head.weight, replies.ids, temperature)
