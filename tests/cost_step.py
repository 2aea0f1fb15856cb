"""A step on the trainer's plan with unpadded attention, small enough to be counted: FLOPs, launches and peak memory are compared with the ledger."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from locus_kernels.linear_logprob import linear_logprob
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from locus_fast.cost import Group
from locus_fast.policy import use_attention
from locus_fast.types import Prompt

PLAIN = "flash_for_counting"  # with "flash" in it, transformers hands the vision tower's cu_seqlens over


class PromptKeys:
    """Each prompt attends to itself."""

    def __init__(self, lengths: list[int]):
        self.lengths, self.kv = lengths, {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.kv.setdefault(layer, (k, v))
        pieces = zip(*(t.split(self.lengths, 2) for t in (q, k, v)), strict=True)
        return join([F.scaled_dot_product_attention(*piece, is_causal=True, scale=scale, enable_gqa=True) for piece in pieces])


class DecodeKeys:
    """One new token of each reply of one group attends to the prompt and to its own past."""

    def __init__(self, prompts: PromptKeys):
        self.prompts, self.own = prompts, {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.own[layer] = [torch.cat([past, new], 2) for past, new in zip(self.own[layer], (k, v), strict=True)] if layer in self.own else [k, v]
        whole = [torch.cat([prompt.expand(len(q), -1, -1, -1), own], 2) for prompt, own in zip(self.prompts.kv[layer], self.own[layer], strict=True)]
        return F.scaled_dot_product_attention(q, *whole, scale=scale, enable_gqa=True)


class ReplyKeys:
    """All fed tokens of a group attend to its prompt as one unmasked rectangle, and each reply causally to itself. The two are added, not merged by
    their log-sum-exp: the same work."""

    def __init__(self, prompts: PromptKeys, groups: list[Group]):
        self.prompts, self.groups = prompts, groups

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        prompt_kv = [t.split(self.prompts.lengths, 2) for t in self.prompts.kv[layer]]
        fed = [n for group in self.groups for n in group.fed]
        whole = q.split([sum(group.fed) for group in self.groups], 2)
        to_prompt = [F.scaled_dot_product_attention(*piece, scale=scale, enable_gqa=True) for piece in zip(whole, *prompt_kv, strict=True)]
        pieces = zip(*(t.split(fed, 2) for t in (q, k, v)), strict=True)
        to_own = [F.scaled_dot_product_attention(*piece, is_causal=True, scale=scale, enable_gqa=True) for piece in pieces]
        return join(to_prompt) + join(to_own)


def join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def attention(module, q, k, v, attention_mask=None, scaling=None, dropout=0.0, locus=None, cu_seq_lens_q=None, **_):
    if locus is not None:
        out = locus.attend(module.layer_idx, q, k, v, scaling)
    else:
        pieces = zip(*(t.split(cu_seq_lens_q.diff().tolist(), 2) for t in (q, k, v)), strict=True)
        out = join([F.scaled_dot_product_attention(*piece, scale=scaling) for piece in pieces])
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(PLAIN, attention)


def one_attention(module, q, k, v, attention_mask=None, **_):
    """One operator whatever the sequences, for counting launches."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("flash_as_one", one_attention)


def group_like(prompt: Prompt, replies: list[int]) -> Group:
    return Group(tuple((h, w) for _, h, w in prompt.grids.tolist()), len(prompt.ids), tuple(replies))


def images_of(prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """(patches, grids) of these prompts' images."""
    return torch.cat([p.patches for p in prompts]), torch.cat([p.grids for p in prompts])


def see(model, patches: Tensor, grids: Tensor):
    """The vision tower's output."""
    return model.model.visual(patches, grid_thw=grids, return_dict=True)


def read(model, prompts: list[Prompt], features) -> tuple[PromptKeys, Tensor]:
    """The language model's pass over the prompts: their keys, and their last states [B, D]."""
    ids, position = torch.cat([p.ids for p in prompts]), torch.cat([p.position for p in prompts], 1)
    is_image = ids == model.config.image_token_id
    embeds = model.model.language_model.embed_tokens(ids).masked_scatter(is_image[:, None], features.pooler_output)
    deep = getattr(features, "deepstack_features", None)
    extra = {} if deep is None else {"visual_pos_masks": is_image[None], "deepstack_visual_embeds": list(deep)}
    context = PromptKeys([len(p.ids) for p in prompts])
    hidden = model.model.language_model(inputs_embeds=embeds[None], position_ids=position[:, None], use_cache=False, locus=context, **extra)
    return context, hidden.last_hidden_state[0, torch.tensor(context.lengths).cumsum(0) - 1]


def answer(model, keys: PromptKeys, groups: list[Group]) -> Tensor:
    """The states of all fed reply tokens [T_in, D]; what the tokens are does not matter here."""
    fed = torch.cat([torch.arange(n) for group in groups for n in group.fed])
    embeds = model.model.language_model.embed_tokens(fed % 64)[None]
    position = (fed + max(keys.lengths)).expand(3, 1, -1)
    return model.model.language_model(inputs_embeds=embeds, position_ids=position, use_cache=False, locus=ReplyKeys(keys, groups)).last_hidden_state[
        0
    ]


@torch.no_grad()
def decode(model, keys: PromptKeys, last: Tensor, replies: int, tokens: int) -> None:
    """Greedy decoding of one prompt's replies, all `tokens` long."""
    context, hidden = DecodeKeys(keys), last.expand(replies, -1)
    for at in range(tokens):
        chosen = model.lm_head(hidden).argmax(-1)
        if at + 1 < tokens:
            embeds = model.model.language_model.embed_tokens(chosen)[:, None]
            position = torch.full((3, replies, 1), keys.lengths[0] + at)
            hidden = model.model.language_model(inputs_embeds=embeds, position_ids=position, use_cache=False, locus=context).last_hidden_state[:, 0]


def score(model, last: Tensor, hidden: Tensor, groups: list[Group]) -> Tensor:
    """Log-probabilities [T] from as many states as there are reply tokens."""
    first = torch.cat([last[i].expand(len(group.replies), -1) for i, group in enumerate(groups)])
    states = torch.cat([first, hidden])
    return linear_logprob(states, model.lm_head.weight, torch.arange(len(states)) % 64, 1.0)[0]


def step(model, prompts: list[Prompt], groups: list[Group]) -> None:
    """Prompts, replies and their backward; decoding apart."""
    use_attention(model, PLAIN)
    keys, last = read(model, prompts, see(model, *images_of(prompts)))
    score(model, last, answer(model, keys, groups), groups).sum().backward()
