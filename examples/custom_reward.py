"""A reward in plain Python on decoded replies, in the trainer's own step: how near the centre of the said box
lies to that of the true one. It reads replies back once a microbatch, which a box shape does not."""

import math
import re
import time
from dataclasses import dataclass
from typing import Any

import torch
from locus_kernels.box_reward import BoxReward, group_advantage
from torch import Tensor

from locus_fast.config import parse
from locus_fast.run.setup import set_up
from locus_fast.step.rollout import Rollout
from locus_fast.step.scoring import Scoring
from locus_fast.step.step import Step


def centre_reward(reply: str, target: list[float]) -> float:
    """1 where the centres meet, falling to 0 where they are the true box's diagonal apart. target: xyxy."""
    if not (found := re.search(r"\[(\d+), ?(\d+), ?(\d+), ?(\d+)\]", reply)):
        return 0.0
    x1, y1, x2, y2 = map(int, found.groups())
    apart = math.hypot(x1 + x2 - target[0] - target[2], y1 + y2 - target[1] - target[3]) / 2
    return max(0.0, 1 - apart / math.dist(target[:2], target[2:]))


@dataclass(frozen=True)
class CentreScoring(Scoring):
    """Reads boxes as the trainer does, for the metrics, and rewards by `centre_reward`."""

    tokenizer: Any

    def reward(self, rollout: Rollout, target: Tensor, progress: float) -> BoxReward:
        scored = super().reward(rollout, target, progress)
        rows = zip(rollout.ids, rollout.lengths.tolist(), strict=True)
        replies = [self.tokenizer.decode(row[:n]) for row, n in rows]
        targets = target.repeat_interleave(self.group_size, 0).tolist()
        reward = torch.tensor(list(map(centre_reward, replies, targets)), device=target.device)
        advantage, equal = group_advantage(reward, self.group_size, self.normalize_std)
        return scored._replace(reward=reward, advantage=advantage, zero_variance=equal)


def main() -> None:
    setup = set_up(parse(["--steps", "3", "--prompts", "4", "--kl-coef", "0", "--lr", "1e-3"]))
    config, engine = setup.config, setup.engine
    scoring = CentreScoring(**vars(setup.scoring), tokenizer=setup.origin.source.tokenizer)
    step = Step.of(config, engine, scoring)
    prompts = [setup.inputs.prompter(setup.inputs.cues.train(index)) for index in range(config.prompts)]
    for number in range(config.steps):
        row = step(prompts, number, time.perf_counter(), stop=bool)
        print(f"step {number + 1}: centre reward {row['reward']:.3f}, IoU {row['iou']:.3f}")


if __name__ == "__main__":
    main()
