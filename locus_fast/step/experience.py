"""What a microbatch leaves to train on, and its packing anew: some of its groups, or narrower microbatches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from locus_kernels.shared_prefix_attention import send
from torch import Tensor

from locus_fast.model.packing import PromptBatch, pack
from locus_fast.run.setup import Setup
from locus_fast.step.rollout import Rollout


@dataclass(frozen=True)
class Experience:
    """A microbatch's rollouts and all that training on them needs. R replies, T tokens of the live groups: those whose rewards differ."""

    batch: PromptBatch
    rollout: Rollout
    lengths: list[list[int]]  # of each group's replies, on the host
    live: list[int]  # groups with a gradient
    advantage: Tensor  # float32 [R]
    weight: Tensor  # float32 [R], of each token of a reply
    old: Tensor | None = None  # float32 [T], once known
    reference: Tensor | None = None  # float32 [T]


def select(setup: Setup, whole: Experience, groups: Sequence[int]) -> Experience:
    """Some of an experience's groups, packed anew; itself for all of them. What is known of its tokens needs all its groups to be live."""
    if len(groups) == len(whole.lengths):
        return whole
    G = setup.config.replies
    rows = send(torch.tensor([b * G + g for b in groups for g in range(G)]), setup.device)
    rollout = Rollout(whole.rollout.ids[rows], whole.rollout.lengths[rows], whole.rollout.logprob[rows])
    batch = PromptBatch.of([whole.batch.prompts[b] for b in groups], setup.model.config, setup.device)
    live = [place for place, b in enumerate(groups) if b in whole.live]
    tokens = torch.arange(sum(map(sum, whole.lengths))).split([sum(n) for n in whole.lengths])
    known = send(torch.cat([tokens[b] for b in groups]), setup.device)
    old, reference = (None if values is None else values[known] for values in (whole.old, whole.reference))
    return Experience(batch, rollout, [whole.lengths[b] for b in groups], live, whole.advantage[rows], whole.weight[rows], old, reference)


def parts(setup: Setup, whole: Experience) -> Iterator[Experience]:
    """The microbatches to train on of rollouts that may be wider than one: their live groups, whose lengths are known by now."""
    prompts = [whole.batch.prompts[b] for b in whole.live]
    costs = [setup.cost(prompt, sum(whole.lengths[b])) for prompt, b in zip(prompts, whole.live, strict=True)]
    for chosen in pack(prompts, setup.budget.shares(costs, setup.budget.tokens), setup.budget.tokens):
        yield select(setup, whole, [whole.live[place] for place in chosen])
