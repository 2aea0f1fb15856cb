"""What computes a step: the model on its device, its sampler, and what a microbatch may cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from locus_fast.cost.flops import group_cost
from locus_fast.cost.plan import Plan
from locus_fast.cost.shapes import ModelShape, Trained
from locus_fast.model.families import shape_of
from locus_fast.model.packing import PromptBatch, pack
from locus_fast.model.prompts import Prompt
from locus_fast.step.budget import Budget
from locus_fast.step.rollout import Decoder
from locus_fast.step.vocabulary import Vocabulary


@dataclass(frozen=True)
class Engine:
    """The policy and what it runs on. Costs are in language-token equivalents, see
    `cost.flops.group_cost`."""

    device: torch.device
    model: Any
    decoder: Decoder
    shape: ModelShape
    trained: Trained
    plan: Plan
    budget: Budget

    @staticmethod
    def of(model: Any, vocabulary: Vocabulary, plan: Plan, rollout_tokens: int, trained: Trained) -> Engine:
        """Of a model on its device, by a plan. rollout_tokens: budget of a rollout, where it is more than a
        microbatch's. trained: which of the model's parts are."""
        budget = Budget(plan.tokens, rollout_tokens)
        return Engine(
            model.device, model, Decoder(model, vocabulary), shape_of(model.config), trained, plan, budget
        )

    def fits(self, batch: PromptBatch, reply_tokens: int) -> bool:
        """Whether the rollout of a batch can be trained on as one microbatch."""
        costs = [self.cost(prompt, reply_tokens) for prompt in batch.prompts]
        return sum(self.budget.shares(costs, self.budget.rollout)) <= self.budget.tokens

    def cost(self, prompt: Prompt, reply_tokens: int) -> float:
        """Of a group with so many reply tokens together."""
        grids = [(rows, columns) for _, rows, columns in prompt.grids.tolist()]
        return group_cost(self.shape, grids, len(prompt.ids), reply_tokens)

    def pack(self, prompts: Sequence[Prompt], costs: Sequence[float], budget: float) -> list[list[int]]:
        """Indices of the prompts of each microbatch. Raises UserError for a group that does not fit alone."""
        return pack(prompts, self.budget.shares(costs, budget), budget)

    def microbatches(
        self, prompts: Sequence[Prompt], first: int, reply_tokens: int, budget: float
    ) -> Iterator[tuple[list[int], PromptBatch]]:
        """Prompts packed within the budget, with so many reply tokens each at most: (their numbers, counted
        from `first`; the batch on the device)."""
        costs = [self.cost(prompt, reply_tokens) for prompt in prompts]
        for chosen in self.pack(prompts, costs, budget):
            batch = PromptBatch.of([prompts[i] for i in chosen], self.model.config, self.device)
            yield [first + i for i in chosen], batch
