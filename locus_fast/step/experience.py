"""What a microbatch leaves to train on, and its packing anew: some of its groups, or narrower
microbatches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from locus_kernels.box_reward import BoxReward
from locus_kernels.shared_prefix_attention import send
from torch import Tensor

from locus_fast.config import Config
from locus_fast.model.packing import PromptBatch, Replies
from locus_fast.step.engine import Engine
from locus_fast.step.losses import AGGREGATIONS
from locus_fast.step.rollout import Rollout


@dataclass(frozen=True)
class Experience:
    """A microbatch's rollouts and all that training on them needs. A group is active if it has a gradient. R
    replies, T tokens of the active groups' replies."""

    batch: PromptBatch
    rollout: Rollout
    lengths: list[list[int]]  # of each group's replies, on the host
    active: list[int]  # groups, ascending
    advantage: Tensor  # float32 [R]
    weight: Tensor  # float32 [R], of each token of a reply in the loss
    old: Tensor | None = None  # float32 [T], log-probs of the policy that sampled, once known
    reference: Tensor | None = None  # float32 [T], log-probs of the reference policy

    @cached_property
    def replies(self) -> Replies:
        """The active groups' replies, packed."""
        return Replies.of(self.batch, self.rollout.ids, self.lengths, self.active)


def experience_of(
    config: Config, batch: PromptBatch, rollout: Rollout, scored: BoxReward, always_active: bool
) -> tuple[Experience, int]:
    """(what a microbatch's rollouts leave to train on, their share of the batch's denominator), with the one
    readback of a microbatch.

    A group whose rewards are all equal has advantages of 0: it has a gradient only if the objective has one
    without advantages (always_active: the KL, the entropy), and if such groups are not to be skipped."""
    R = len(rollout.ids)
    host = torch.cat([rollout.lengths, rollout.truncated.long(), scored.zero_variance.long()]).tolist()
    tokens, truncated, zero_variance = host[:R], host[R : 2 * R], host[2 * R :]
    kept = (~rollout.truncated, [not is_cut for is_cut in truncated]) if config.mask_truncated else None
    weight, share = AGGREGATIONS[config.loss_agg](rollout.lengths, tokens, kept, config.max_new_tokens)
    lengths = [tokens[r : r + config.group_size] for r in range(0, R, config.group_size)]
    held = always_active and not config.skip_zero_variance
    active = [group for group, is_equal in enumerate(zero_variance) if held or not is_equal]
    return Experience(batch, rollout, lengths, active, scored.advantage, weight), share


def select(engine: Engine, whole: Experience, groups: Sequence[int]) -> Experience:
    """Some of an experience's groups, packed anew; itself for all of them. What is known of its tokens needs
    all its groups to be active."""
    if len(groups) == len(whole.lengths):
        return whole
    first = [0]
    for group in whole.lengths:
        first.append(first[-1] + len(group))
    rows = send(torch.tensor([row for b in groups for row in range(first[b], first[b + 1])]), engine.device)
    batch = PromptBatch.of([whole.batch.prompts[b] for b in groups], engine.model.config, engine.device)
    active = [place for place, b in enumerate(groups) if b in whole.active]
    tokens = torch.arange(sum(map(sum, whole.lengths))).split([sum(n) for n in whole.lengths])
    known = send(torch.cat([tokens[b] for b in groups]), engine.device)
    old, reference = (None if values is None else values[known] for values in (whole.old, whole.reference))
    lengths = [whole.lengths[b] for b in groups]
    rest = (whole.advantage[rows], whole.weight[rows], old, reference)
    return Experience(batch, whole.rollout.rows(rows), lengths, active, *rest)


def microbatches(engine: Engine, whole: Experience) -> Iterator[Experience]:
    """The microbatches to train on of rollouts that may be wider than one: their active groups, whose lengths
    are known by now."""
    prompts = [whole.batch.prompts[b] for b in whole.active]
    costs = [
        engine.cost(prompt, sum(whole.lengths[b])) for prompt, b in zip(prompts, whole.active, strict=True)
    ]
    for chosen in engine.pack(prompts, costs, engine.budget.tokens):
        yield select(engine, whole, [whole.active[place] for place in chosen])
