"""Small models and their work, for the tests of the cost ledger."""

from __future__ import annotations

import torch

from locus_fast.cost.shapes import Group
from locus_fast.packing import PromptBatch, Replies
from locus_fast.rollout import Vocabulary
from locus_fast.types import Prompt, Rollout
from tests.small_models import CLASSES, VOCABULARY, small_model, small_prompt

FAMILIES = sorted(CLASSES)
GRIDS = [[(8, 12), (4, 4)], [(10, 6), (4, 8)]]  # whole windows, and ragged ones
REPLIES = [[5, 1, 9], [3, 7, 2]]
ENDLESS = Vocabulary(torch.arange(VOCABULARY) < 3, torch.tensor([5]))  # the id that would end a reply is never drawn


def work(family: str):
    """(model, batch of prompts, groups)."""
    model = small_model(family)
    prompts = [small_prompt(model, grids, words=5 + 3 * i, seed=i) for i, grids in enumerate(GRIDS)]
    groups = [group_like(prompt, replies) for prompt, replies in zip(prompts, REPLIES, strict=True)]
    return model, PromptBatch.of(prompts, model.config, "cpu"), groups


def group_like(prompt: Prompt, replies: list[int]) -> Group:
    return Group(tuple((h, w) for _, h, w in prompt.grids.tolist()), len(prompt.ids), tuple(replies))


def answers(batch: PromptBatch, groups: list[Group]) -> Replies:
    """Replies of the groups' lengths; what the tokens are does not matter here."""
    lengths = [list(group.replies) for group in groups]
    ids = torch.arange(max(map(max, lengths)), device=batch.ids.device).expand(sum(map(len, lengths)), -1)
    return Replies.of(batch, Rollout(ids, ids[:, 0], ids.float()), lengths, range(len(groups)))
