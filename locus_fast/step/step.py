"""One step of the algorithm: rollout -> reward -> advantage -> loss -> update.

For each microbatch of whole groups:

    prompts -- prefill, gradients on, once a group --> keys and values of every layer, kept in the graph
        -> decode G replies on them -> token ids -> reward -> advantage -> one forward over all reply tokens
        on the same keys and values -> loss -> backward, replies and then prompts

and then one optimizer step. A group is *active* if it has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from locus_fast.config import Config
from locus_fast.model.policy import (
    Prefix,
    checkpoint_activations,
    detach_prefix,
    prefill,
    reply_hidden,
    reply_logprob,
    trains_vision,
)
from locus_fast.model.prompts import Prompt
from locus_fast.model.reference import Reference, make_reference
from locus_fast.step.engine import Engine
from locus_fast.step.experience import Experience, experience_of, microbatches, select
from locus_fast.step.losses import Objective
from locus_fast.step.metrics import FIRST_PASSES, FURTHER_PASSES, Totals, add_flops, summarise
from locus_fast.step.optim import clip_and_step, optimizer_of, rate_factor
from locus_fast.step.rollout import Sampling
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

    @staticmethod
    def of(config: Config, engine: Engine, scoring: Scoring) -> Step:
        """With a new optimizer, and without a reference until `begin`."""
        return Step(config, engine, scoring, None, optimizer_of(config, engine.model))

    def begin(self) -> None:
        """Takes the model as it is now for the reference, and has it trained with activations recomputed as
        planned."""
        model = self.engine.model
        self.reference = make_reference(model, self.config.reference) if self.config.kl_coef > 0 else None
        if self.engine.plan.checkpointing:
            checkpoint_activations(model, self.engine.plan.checkpointing)

    def __call__(
        self, prompts: list[Prompt], step: int, began: float, stop: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """Rollouts of these prompts and the updates on them; the metrics of step `step` (from 0), which began
        at `began` by `time.perf_counter`, or None if `stop` said so before the first update. It is asked
        between microbatches."""
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
            # a policy whose own log-probs are not numbers earns no reward, and so has no gradient that shows
            # it
            usable = torch.as_tensor(totals.sums["not_finite"] == 0)
            seed = config.seed + step * config.updates_per_batch + again
            norms.append(self._update(denominator, usable, factor, seed))
        totals.add(denominator=float(denominator * config.updates_per_batch))
        skipped = sum(len(prompt.skipped) for prompt in prompts)
        return summarise(totals, step, torch.stack(norms), config.lr * factor, skipped, began)

    def too_small(self) -> str:
        """What to say of a run that ends for want of memory."""
        return self.engine.budget.too_small(self.engine.plan.checkpointing)

    # ----------------------------------------------------------------------------- rollout, reward, advantage
    def _first_gradient(
        self, prompts: list[Prompt], step: int, stop: Callable[[], bool]
    ) -> tuple[Totals, list[Experience], int] | None:
        """Rollouts, and the gradient of their summed loss: (sums for the metrics, what further updates need,
        the denominator), or None if `stop` said so. Rollouts follow from the seed and the weights alone, so
        it can be done again."""
        config, engine = self.config, self.engine
        totals, experiences, denominator = Totals(), [], 0
        self.optimizer.zero_grad(set_to_none=True)
        longest = config.group_size * config.max_new_tokens
        for numbers, batch in engine.microbatches(
            prompts, step * config.prompts, longest, engine.budget.rollout
        ):
            if stop():
                return None
            reusable = engine.fits(batch, longest)
            with torch.set_grad_enabled(reusable):
                # the sampler's prefill is the training forward's prefix
                prefix = prefill(engine.model, batch)
            rollout = engine.decoder.generate(prefix, self.sampling, seed=config.seed, groups=numbers)
            scored = self.scoring.reward(rollout, batch.target, step / config.steps)
            whole, share = experience_of(
                config, batch, rollout, scored, self.objective.has_gradient_without_advantage
            )
            totals.add_rollout(whole, scored)
            denominator += share
            reusable = reusable and self._reuse_pays(whole)
            self._count_flops(totals, whole, FIRST_PASSES, prefilled_again=not reusable)
            held = [prefix] if reusable else []
            # a wide rollout's keys and values make room, a microbatch's do before the next one's are made
            del prefix
            for part in [whole] if reusable else microbatches(engine, whole):
                if part.active:
                    learned = self._learn(
                        part, held.pop() if held else prefill(engine.model, part.batch), totals
                    )
                    experiences += [learned] if config.updates_per_batch > 1 else []
        return totals, experiences, denominator

    def _reuse_pays(self, whole: Experience) -> bool:
        """Whether the rollout's prefix should be trained on: its backward goes through the other groups'
        prompts too, and a forward pass of the active ones alone costs less where they are few. A backward
        costs two forwards, and one more where it is recomputed."""
        prompts = [self.engine.cost(prompt, 0) for prompt in whole.batch.prompts]
        active = sum(prompts[group] for group in whole.active)
        return active >= (2 + (self.engine.plan.checkpointing > 0)) * (sum(prompts) - active)

    # ----------------------------------------------------------------------------------------- loss, backward
    def _learn(self, experience: Experience, prefix: Prefix, totals: Totals) -> Experience:
        """The gradient of the summed loss of the active groups' replies, on the prefix. Returns the active
        groups with what further updates on them need. The reference sees the active groups alone."""
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
        """Log-probs [T] of the reference policy, None without one. shared: a prefix whose vision features are
        the reference's too, because the tower is frozen."""
        if self.reference is None:
            return None
        with torch.no_grad(), self.reference.model() as model:
            prefix = prefill(model, experience.batch, shared.features if shared else None)
            return reply_logprob(model, prefix, experience.replies, self.config.temperature)[0]

    def _backward(self, hidden: Tensor, experience: Experience, totals: Totals) -> Tensor:
        """Adds the gradient of a microbatch's summed loss, given the states [T, D] that predict its replies'
        tokens. Returns the tokens' log-probs [T]."""
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
        """The gradient of the same rollouts' loss at the weights as they are now: the prefix again, against
        the stored old log-probs. Returns what it adds to the metrics."""
        totals = Totals()
        self.optimizer.zero_grad(set_to_none=True)
        for whole in experiences:
            for experience in microbatches(self.engine, whole):
                detached, backward_prefix = detach_prefix(prefill(self.engine.model, experience.batch))
                hidden = reply_hidden(self.engine.model, detached, experience.replies)
                del detached
                self._backward(hidden, experience, totals)
                backward_prefix()
                self._count_flops(totals, experience, FURTHER_PASSES)
        return totals

    # ------------------------------------------------------------------------------------------------- update
    def _update(self, denominator: int, usable: Tensor, factor: float, seed: int) -> Tensor:
        """The optimizer's step, which finds out before anything has moved whether it has room. Returns the
        gradient's norm."""
        move = partial(
            clip_and_step,
            self.optimizer,
            denominator=max(1, denominator),
            usable=usable,
            factor=factor,
            clip=self.config.max_grad_norm,
            seed=seed,
        )
        return self.engine.budget.find_room(move, self.engine.decoder, "the optimizer's step")

    def _count_flops(
        self, totals: Totals, experience: Experience, columns: Sequence[str], prefilled_again: bool = False
    ) -> None:
        add_flops(totals, self.engine, experience, self.config.kl_coef > 0, columns, prefilled_again)
