"""The Hugging Face model as the trainer uses it: one prefill a group, replies on the kept keys and values,
log-probabilities of the replies. How it attends is `model.attention`'s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from locus_kernels.linear_logprob import linear_logprob
from torch import Tensor

from locus_fast.model.attention import PromptPass, ReplyPass, VisionPass, backend_of
from locus_fast.model.packing import PromptBatch, Replies, VisionLayout

HEAD_ROWS = 8192  # of the head that a CPU holds in float32 at a time


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


def checkpoint_activations(model: Any, every: int = 1) -> None:
    """Recompute the activations of every `every`-th block of the vision tower and layer of the language model
    in backward, the first of each included, and go to training mode, without which they do not.
    Non-reentrant, so that the remembered keys and values stay in the graph."""
    # there is no dropout, and the random state is read back
    options = {
        "use_reentrant": False,
        "preserve_rng_state": False,
    }
    if hasattr(model, "activation_checkpointing_enable"):  # the name in newer transformers
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
    # or a frozen tower's patches would have a backward, and a frozen embedding's tokens
    model.disable_input_require_grads()
    for layers in (model.model.visual.blocks, model.model.language_model.layers):
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = index % every == 0
    model.train()


def trains_vision(model: Any) -> bool:
    """Whether anything of the vision tower is trained."""
    return any(p.requires_grad for p in model.model.visual.parameters())


def encode_images(model: Any, patches: Tensor, grids: Tensor, layout: VisionLayout | None) -> Features:
    """The vision tower over packed images, each once; without a gradient where all of it is frozen. grids on
    the host."""
    if layout is None:
        return Features(None, None)
    visual, context = model.model.visual, VisionPass(layout, backend_of(model))
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains_vision(model)):
        out = visual(
            patches.to(visual.dtype), grid_thw=grids, return_dict=True, locus=context, **layout.keywords
        )
    return Features(out.pooler_output, getattr(out, "deepstack_features", None))


def prefill(model: Any, batch: PromptBatch, features: Features | None = None) -> Prefix:
    """Vision tower and language model over the packed prompts, once a group, with whatever gradient mode is
    on.

    features: the vision tower's, where they are known already (a reference that shares a frozen tower).
    """
    features = (
        encode_images(model, batch.patches, batch.grids, batch.vision) if features is None else features
    )
    language = model.model.language_model
    embeds = language.embed_tokens(batch.ids)
    extra: dict[str, Any] = {}
    if features.image is not None:
        embeds = embeds.index_copy(0, batch.image_place, features.image.to(embeds.dtype))
    if features.deep is not None:
        extra = {"visual_pos_masks": batch.image_place, "deepstack_visual_embeds": list(features.deep)}
    context = PromptPass(batch.pairs, backend_of(model))
    hidden = language(
        inputs_embeds=embeds[None],
        position_ids=batch.position[:, None],
        use_cache=False,
        locus=context,
        **extra,
    ).last_hidden_state
    return Prefix(batch, features, context.kv, hidden[0, batch.last])


def detach_prefix(prefix: Prefix) -> tuple[Prefix, Callable[[], None]]:
    """(the prefix to compute replies on, what takes its gradient on through the prompts when the replies'
    backward has run).

    One backward through both would hold every weight's gradient of the replies' pass until the prompts' pass
    adds its own: as much memory as the language model's gradients. Cut in two, each is added to the gradients
    that are there at once. The given prefix should not be used any more.
    """
    ends = [t for pair in prefix.kv.values() for t in pair] + [prefix.last_hidden]
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in ends]
    kv = {layer: (leaves[2 * i], leaves[2 * i + 1]) for i, layer in enumerate(prefix.kv)}

    def backward_prefix() -> None:
        reached = [(end, leaf.grad) for end, leaf in zip(ends, leaves, strict=True) if leaf.grad is not None]
        ends.clear()
        leaves.clear()
        torch.autograd.backward([end for end, _ in reached], [gradient for _, gradient in reached])

    return replace(prefix, kv=kv, last_hidden=leaves[-1]), backward_prefix


def next_logits(model: Any, hidden: Tensor) -> Tensor:
    """The head's logits, float32 [S, V], of states [S, D] in the model's dtype: never rounded to it, as the
    training forward's are not, so that sampler and trainer agree on the log-probs of equal states."""
    weight = model.lm_head.weight
    if weight.dtype == torch.float32:
        return torch.nn.functional.linear(hidden, weight)
    if hidden.device.type == "cpu":  # which has no product of low precision with a float32 result
        return torch.cat([hidden.float() @ part.float().T for part in weight.split(HEAD_ROWS)], 1)
    return torch.mm(hidden, weight.T, out_dtype=torch.float32)


def reply_hidden(model: Any, prefix: Prefix, replies: Replies) -> Tensor:
    """The states that predict each reply token, [T, D]: one forward pass over all replies on the kept keys
    and values."""
    if len(replies.fed) == 0:  # every reply is a single token
        return prefix.last_hidden[replies.predictor]
    context = ReplyPass(replies.layout, backend_of(model), prefix.kv)
    language = model.model.language_model
    embeds = language.embed_tokens(replies.ids[replies.fed])[None]
    position = replies.position.expand(3, 1, -1)
    hidden = language(
        inputs_embeds=embeds, position_ids=position, use_cache=False, locus=context
    ).last_hidden_state[0]
    return torch.cat([prefix.last_hidden, hidden])[replies.predictor]


def reply_logprob(model: Any, prefix: Prefix, replies: Replies, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each reply token, float32 [T], at the sampling temperature."""
    return linear_logprob(
        reply_hidden(model, prefix, replies), model.lm_head.weight, replies.ids, temperature
    )
