"""From the token ids of replies to boxes, rewards and advantages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from locus_kernels.box_reward import BoxReading, BoxReward, TokenTable, box_reward, read_boxes
from locus_kernels.shared_prefix_attention import send
from torch import Tensor

from locus_fast.config import Config
from locus_fast.model.prompts import PROMPT_STYLES
from locus_fast.step.rollout import Rollout


@dataclass(frozen=True)
class Scoring:
    """How replies are read and what they earn."""

    table: TokenTable
    opening: tuple[int, ...]  # ids that the prompt has written of each reply, and that are read with it
    which: str  # box of a reply that counts, and what the format reward asks for: see `box_reward`
    grammar: str
    group_size: int
    shape: str
    format_weight: float
    normalize_std: bool

    @staticmethod
    def of(config: Config, table: TokenTable, opening: list[int]) -> Scoring:
        style = PROMPT_STYLES[config.prompt_style]
        reading = (table, tuple(opening), style.which, style.grammar)
        return Scoring(*reading, config.group_size, config.reward, config.format_weight, config.normalize_std)

    def _whole(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Replies with what the prompt has written of them: a thinking model's `<think>`, and the answer's
        prefix."""
        opening = send(torch.tensor(self.opening, dtype=torch.int64), ids.device)
        return torch.cat([opening.expand(len(ids), -1), ids], 1), lengths + len(opening)

    def read(self, ids: Tensor, lengths: Tensor) -> BoxReading:
        """The box of each reply. ids int64 [R, L], lengths int64 [R]."""
        return read_boxes(*self._whole(ids, lengths), self.table, which=self.which, grammar=self.grammar)

    def reward(self, rollout: Rollout, target: Tensor, progress: float) -> BoxReward:
        """Box, reward and group advantage of each reply. target: float32 [B, 4], a group's true box in the
        family's frame; progress: share of the training that is done, in [0, 1]."""
        return box_reward(
            *self._whole(rollout.ids, rollout.lengths),
            self.table,
            target.repeat_interleave(self.group_size, 0),
            group_size=self.group_size,
            which=self.which,
            grammar=self.grammar,
            shape=self.shape,
            format_weight=self.format_weight,
            normalize_std=self.normalize_std,
            progress=progress,
        )
