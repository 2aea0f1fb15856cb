"""Our side of the race: one whole step, image to updated weights, with its phases timed one by one."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from locus_kernels.box_reward import box_reward, build_token_table, group_advantage
from torch import Tensor

from bench.race_case import GROUP, KL, LEARNING_RATE, LENGTH, Case, luck
from locus_fast.config import Config
from locus_fast.model.attention import use_attention
from locus_fast.model.families import PARTS
from locus_fast.model.packing import PromptBatch, Replies
from locus_fast.model.policy import detach_prefix, prefill, reply_logprob
from locus_fast.step.losses import LossInputs, Objective
from locus_fast.step.optim import clip_and_step, parameter_groups
from locus_fast.step.optimizers import make_optimizer
from locus_fast.step.rollout import Decoder, Rollout, Sampling
from locus_fast.step.vocabulary import Vocabulary

SAMPLING = Sampling(GROUP, LENGTH, temperature=1.0, top_p=1.0)


class Ours:
    """The case's model, optimizer and (with a KL term) reference; `step()` is one update."""

    def __init__(self, case: Case, kl: bool):
        self.case, self.model = case, case.load()
        use_attention(self.model)
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if kl else None
        self.optimizer = make_optimizer(
            "adamw", parameter_groups(self.model, dict.fromkeys(PARTS, LEARNING_RATE)), weight_decay=0.0
        )
        self.decoder = Decoder(
            self.model, Vocabulary(case.allowed, torch.tensor([case.tokenizer.eos_token_id]))
        )
        self.table = build_token_table(case.tokenizer, self.model.lm_head.weight.shape[0])
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.objective = Objective.of(Config(clip_low=0.2, clip_high=0.2, kl_coef=KL))
        self.seed = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - began)

    def step(self) -> tuple[PromptBatch, Rollout, Tensor]:
        """One update on fresh replies; returns what the correctness gate compares: prompts, replies, their
        log-probs [T] before the update."""
        self.seed += 1
        self.optimizer.zero_grad(set_to_none=True)
        with self.phase("preprocess"):
            batch = PromptBatch.of(
                [self.case.prompter(example) for example in self.case.examples], self.model.config, "cpu"
            )
        with self.phase("prefill"):
            prefix, backward_prefix = detach_prefix(prefill(self.model, batch))
        groups = range(len(batch.lengths))
        with self.phase("decode"):
            rollout = self.decoder.generate(prefix, SAMPLING, seed=self.seed, groups=groups)
        with self.phase("reward"):
            scored = box_reward(
                rollout.ids,
                rollout.lengths,
                self.table,
                batch.target.repeat_interleave(GROUP, 0),
                GROUP,
                which="first",
                grammar="direct",
            )
            advantage, _ = group_advantage(scored.reward + luck(len(rollout.ids)), GROUP)
            lengths = rollout.lengths.view(-1, GROUP).tolist()
        with self.phase("suffix"):
            replies = Replies.of(batch, rollout.ids, lengths, groups)
            logprob, entropy = reply_logprob(self.model, prefix, replies, temperature=1.0)
        reference = None
        if self.reference is not None:
            with self.phase("reference"), torch.no_grad():
                reference, _ = reply_logprob(
                    self.reference, prefill(self.reference, batch), replies, temperature=1.0
                )
        with self.phase("backward"):
            weight = torch.ones_like(logprob)
            vectors = (
                logprob.detach(),
                reference,
                advantage[replies.row],
                weight,
                replies.row,
                rollout.lengths,
            )
            loss, _ = self.objective(LossInputs(logprob, *vectors, entropy))
            loss.backward()
            backward_prefix()
        with self.phase("optimizer"):
            clip_and_step(
                self.optimizer, denominator=sum(map(sum, lengths)), factor=1.0, clip=1.0, seed=self.seed
            )
        return batch, rollout, logprob.detach()


def plain_logprob(model: Any, batch: PromptBatch, rollout: Rollout, row: int) -> Tensor:
    """Log-probs [L] of one reply by plain transformers, its whole prompt and images run again for it
    alone."""
    prompt, reply = batch.prompts[row // GROUP], rollout.ids[row]
    ids = torch.cat([prompt.ids, reply])[None]
    is_image = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            mm_token_type_ids=is_image,
            pixel_values=prompt.patches,
            image_grid_thw=prompt.grids,
            use_cache=False,
        ).logits[0]
    return logits[len(prompt.ids) - 1 : -1].log_softmax(-1).gather(-1, reply[:, None])[:, 0]


def check(plain: Any, batch: PromptBatch, rollout: Rollout, logprob: Tensor) -> None:
    """Raises AssertionError unless every reply has its full length and a step's log-probs [T] are plain
    transformers' (`plain`, which has the weights that the step began with) for the last reply of each group.
    """
    assert (rollout.lengths == LENGTH).all()
    for row in range(GROUP - 1, len(rollout.ids), GROUP):
        torch.testing.assert_close(
            logprob.view(-1, LENGTH)[row], plain_logprob(plain, batch, rollout, row), rtol=0, atol=2e-5
        )
