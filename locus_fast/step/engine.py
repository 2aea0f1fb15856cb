"""What computes a step: the model on its device, its sampler, and what a microbatch may cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from locus_fast.cost.flops import group_cost
from locus_fast.cost.plan import Plan
from locus_fast.cost.shapes import ModelShape, Trained
from locus_fast.model.packing import PromptBatch, pack
from locus_fast.model.prompts import Prompt
from locus_fast.step.budget import Budget
from locus_fast.step.rollout import Decoder


@dataclass(frozen=True)
class Engine:
    """The policy and what it runs on. Costs are in language-token equivalents, see `cost.flops.group_cost`."""

    device: torch.device
    model: Any
    decoder: Decoder
    shape: ModelShape
    trained: Trained
    plan: Plan
    budget: Budget

    def cost(self, prompt: Prompt, reply_tokens: int) -> float:
        """Of a group with so many reply tokens together."""
        grids = [(rows, columns) for _, rows, columns in prompt.grids.tolist()]
        return group_cost(self.shape, grids, len(prompt.ids), reply_tokens)

    def pack(self, prompts: Sequence[Prompt], costs: Sequence[float], budget: float) -> list[list[int]]:
        """Indices of the prompts of each microbatch. Raises UserError for a group that does not fit alone."""
        return pack(prompts, self.budget.shares(costs, budget), budget)

    def microbatches(self, prompts: Sequence[Prompt], first: int, reply_tokens: int, budget: float) -> Iterator[tuple[list[int], PromptBatch]]:
        """Prompts packed within the budget, with so many reply tokens each at most: (their numbers, counted from
        `first`; the batch on the device)."""
        costs = [self.cost(prompt, reply_tokens) for prompt in prompts]
        for chosen in self.pack(prompts, costs, budget):
            batch = PromptBatch.of([prompts[i] for i in chosen], self.model.config, self.device)
            yield [first + i for i in chosen], batch
