"""One step of the algorithm: rollout -> reward -> advantage -> loss -> update.

For each microbatch of whole groups:

    prompts -- prefill, gradients on, once a group --> keys and values of every layer, kept in the graph
        -> decode G replies on them -> token ids -> reward -> advantage
        -> one forward over all reply tokens on the same keys and values -> loss -> backward, replies and then prompts

and then one optimizer step. A group is *active* if it has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from locus_kernels.box_reward import BoxReward
from torch import Tensor

from locus_fast.config import Config
from locus_fast.cost.flops import COLUMNS
from locus_fast.errors import UserError
from locus_fast.model.packing import PromptBatch
from locus_fast.model.policy import Prefix, detach_prefix, prefill, reply_hidden, reply_logprob, trains_vision
from locus_fast.model.prompts import Prompt
from locus_fast.model.reference import Reference
from locus_fast.step.budget import NO_ROOM, make_room
from locus_fast.step.engine import Engine
from locus_fast.step.experience import Experience, microbatches, select
from locus_fast.step.losses import AGGREGATIONS, Objective
from locus_fast.step.metrics import Totals, add_flops, summarise
from locus_fast.step.optim import clip_and_step, rate_factor
from locus_fast.step.rollout import Rollout, Sampling
from locus_fast.step.scoring import Scoring


class Step:
    """The algorithm with its settings and what it works on. Call it once a step."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        scoring: Scoring,
        reference: Reference | None,
        optimizer: torch.optim.Optimizer,
    ):
        self.config, self.engine, self.scoring = config, engine, scoring
        self.reference, self.optimizer = reference, optimizer
        self.objective = Objective.of(config)
        self.sampling = Sampling(config.group_size, config.max_new_tokens, config.temperature, config.top_p)

    def __call__(self, prompts: list[Prompt], step: int, began: float, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Rollouts of these prompts and the updates on them; the metrics of step `step` (from 0), which began at
        `began` by `time.perf_counter`, or None if `stop` said so before the first update. It is asked between
        microbatches."""
        config, engine = self.config, self.engine
        done = engine.budget.retry(lambda: self._first_gradient(prompts, step, stop), engine.decoder)
        if done is None:
            return None
        totals, experiences, denominator = done
        factor = rate_factor(step, config.steps, config.warmup_ratio, config.lr_schedule)
        norms = []
        for again in range(config.updates_per_batch):
            if again:
                totals.join(engine.budget.retry(lambda: self._further_gradient(experiences), engine.decoder))
            # a policy whose own log-probs are not numbers earns no reward, and so has no gradient that shows it
            usable = torch.as_tensor(totals.sums["not_finite"] == 0)
            seed = config.seed + step * config.updates_per_batch + again
            norms.append(self._update(denominator, usable, factor, seed))
        totals.add(denominator=float(denominator * config.updates_per_batch))
        skipped = sum(len(prompt.skipped) for prompt in prompts)
        return summarise(totals, step, torch.stack(norms), config.lr * factor, skipped, began)

    def too_small(self) -> str:
        """What to say of a run that ends for want of memory."""
        return self.engine.budget.too_small(self.engine.plan.checkpointing)

    # ------------------------------------------------------------------------------------ rollout, reward, advantage
    def _first_gradient(self, prompts: list[Prompt], step: int, stop: Callable[[], bool]) -> tuple[Totals, list[Experience], int] | None:
        """Rollouts, and the gradient of their summed loss: (sums for the metrics, what further updates need, the
        denominator), or None if `stop` said so. Rollouts follow from the seed and the weights alone, so it can be
        done again."""
        config, engine = self.config, self.engine
        totals, experiences, denominator = Totals(), [], 0
        self.optimizer.zero_grad(set_to_none=True)
        longest = config.group_size * config.max_new_tokens
        for numbers, batch in engine.microbatches(prompts, step * config.prompts, longest, engine.budget.rollout):
            if stop():
                return None
            reusable = self._is_one_microbatch(batch, longest)
            with torch.set_grad_enabled(reusable):
                prefix = prefill(engine.model, batch)  # the sampler's prefill is the training forward's prefix
            rollout = engine.decoder.generate(prefix, self.sampling, seed=config.seed, groups=numbers)
            scored = self._score(batch, rollout, step / config.steps)
            whole, share = self._experience(totals, batch, rollout, scored)
            denominator += share
            reusable = reusable and self._reuse_pays(whole)
            self._count_flops(totals, whole, COLUMNS, prefilled_again=not reusable)
            held = [prefix] if reusable else []
            del prefix  # a wide rollout's keys and values make room, a microbatch's do before the next one's are made
            for part in [whole] if reusable else microbatches(engine, whole):
                if part.active:
                    learned = self._learn(part, held.pop() if held else prefill(engine.model, part.batch), totals)
                    experiences += [learned] if config.updates_per_batch > 1 else []
        return totals, experiences, denominator

    def _is_one_microbatch(self, batch: PromptBatch, longest: int) -> bool:
        """Whether the rollout of a batch can be trained on in one piece."""
        costs = [self.engine.cost(prompt, longest) for prompt in batch.prompts]
        budget = self.engine.budget
        return sum(budget.shares(costs, budget.rollout)) <= budget.tokens

    def _score(self, batch: PromptBatch, rollout: Rollout, progress: float) -> BoxReward:
        """Box, validity, reward and group advantage of every reply, from token ids."""
        return self.scoring.reward(rollout.ids, rollout.lengths, batch.target, progress)

    def _experience(self, totals: Totals, batch: PromptBatch, rollout: Rollout, scored: BoxReward) -> tuple[Experience, int]:
        """(what a microbatch leaves to train on, its share of the batch's denominator), counted in the metrics."""
        config, R = self.config, len(rollout.ids)
        flags = torch.cat([rollout.lengths, rollout.truncated.long(), scored.zero_variance.long()])
        host = flags.tolist()  # the one readback of a microbatch
        tokens, truncated, equal = host[:R], host[R : 2 * R], host[2 * R :]
        kept = (~rollout.truncated, [not cut for cut in truncated]) if config.mask_truncated else None
        weight, share = AGGREGATIONS[config.loss_agg](rollout.lengths, tokens, kept, config.max_new_tokens)
        totals.add_rollout(batch, rollout, scored, tokens, sum(truncated), sum(equal))
        lengths = [tokens[r : r + config.group_size] for r in range(0, R, config.group_size)]
        return Experience(batch, rollout, lengths, self._active(equal), scored.advantage, weight), share

    def _active(self, zero_variance: Sequence[int]) -> list[int]:
        """The groups that have a gradient, given of each whether its rewards are all equal: then its advantages are 0,
        and it has one only through the KL or the entropy, which is left out where such groups are to be skipped."""
        held = self.objective.has_gradient_without_advantage and not self.config.skip_zero_variance
        return [group for group, equal in enumerate(zero_variance) if held or not equal]

    def _reuse_pays(self, whole: Experience) -> bool:
        """Whether the rollout's prefix should be trained on: its backward goes through the other groups' prompts too,
        and a forward pass of the active ones alone costs less where they are few. A backward costs two forwards, and
        one more where it is recomputed."""
        prompts = [self.engine.cost(prompt, 0) for prompt in whole.batch.prompts]
        active = sum(prompts[group] for group in whole.active)
        return active >= (2 + (self.engine.plan.checkpointing > 0)) * (sum(prompts) - active)

    # ------------------------------------------------------------------------------------------------ loss, backward
    def _learn(self, experience: Experience, prefix: Prefix, totals: Totals) -> Experience:
        """The gradient of the summed loss of the active groups' replies, on the prefix. Returns the active groups
        with what further updates on them need. The reference sees the active groups alone."""
        totals.add(cost=sum(map(self.engine.cost, experience.batch.prompts, map(sum, experience.lengths))))
        totals.add(room=float(self.engine.budget.tokens))
        alone = select(self.engine, experience, experience.active)
        shared = prefix if alone is experience and not trains_vision(self.engine.model) else None
        detached, backward_prefix = detach_prefix(prefix)
        hidden = reply_hidden(self.engine.model, detached, experience.replies)
        reference = self._reference_logprob(alone, shared)
        del prefix, detached, shared
        logprob = self._backward(hidden, replace(experience, reference=reference), totals)
        backward_prefix()
        totals.compare_with_sampler(experience.rollout, experience.replies, logprob)
        return replace(alone, old=logprob, reference=reference)

    def _reference_logprob(self, experience: Experience, shared: Prefix | None) -> Tensor | None:
        """Log-probs [T] of the reference policy, None without one. shared: a prefix whose vision features are the
        reference's too, because the tower is frozen."""
        if self.reference is None:
            return None
        with torch.no_grad(), self.reference.model() as model:
            prefix = prefill(model, experience.batch, shared.features if shared else None)
            return reply_logprob(model, prefix, experience.replies, self.config.temperature)[0]

    def _backward(self, hidden: Tensor, experience: Experience, totals: Totals) -> Tensor:
        """Adds the gradient of a microbatch's summed loss, given the states [T, D] that predict its replies' tokens.
        Returns the tokens' log-probs [T]."""
        replies = experience.replies
        rest = {
            "old": experience.old,
            "reference": experience.reference,
            "advantage": experience.advantage[replies.row],
            "weight": experience.weight[replies.row],
            "row": replies.row,
            "lengths": experience.rollout.lengths,
        }
        head, temperature = self.engine.model.lm_head.weight, self.config.temperature
        loss, logprob, sums = self.objective.from_hidden(hidden, head, replies.ids, temperature, rest)
        loss.backward()
        totals.add_loss(loss.detach(), len(logprob), sums, first=experience.old is None)
        return logprob

    def _further_gradient(self, experiences: list[Experience]) -> Totals:
        """The gradient of the same rollouts' loss at the weights as they are now: the prefix again, against the stored
        old log-probs. Returns what it adds to the metrics."""
        totals = Totals()
        self.optimizer.zero_grad(set_to_none=True)
        for whole in experiences:
            for experience in microbatches(self.engine, whole):
                detached, backward_prefix = detach_prefix(prefill(self.engine.model, experience.batch))
                hidden = reply_hidden(self.engine.model, detached, experience.replies)
                del detached
                self._backward(hidden, experience, totals)
                backward_prefix()
                self._count_flops(totals, experience, COLUMNS[1:4])
        return totals

    # -------------------------------------------------------------------------------------------------------- update
    def _update(self, denominator: int, usable: Tensor, factor: float, seed: int) -> Tensor:
        """The optimizer's step, and where memory is short once more without the decoder's buffers: nothing has moved
        by then. Returns the gradient's norm."""
        move = partial(
            clip_and_step,
            self.optimizer,
            denominator=max(1, denominator),
            usable=usable,
            factor=factor,
            clip=self.config.max_grad_norm,
            seed=seed,
        )
        try:
            return move()
        except torch.OutOfMemoryError:
            make_room(self.engine.decoder)
        try:
            return move()
        except torch.OutOfMemoryError:
            raise UserError(f"the optimizer's step found no memory: {NO_ROOM}, and go on with --resume.") from None

    def _count_flops(self, totals: Totals, experience: Experience, columns: Sequence[str], prefilled_again: bool = False) -> None:
        add_flops(totals, self.engine, experience, self.config.kl_coef > 0, columns, prefilled_again)
