"""What a run works with, decided once; shared by training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from locus_kernels.box_reward import build_token_table

from locus_fast.config import Config
from locus_fast.run.evaluation import Evaluation, evaluate
from locus_fast.run.examples import cue_source, describe_pixels, prompter_of
from locus_fast.run.given import describe, role_of, settle
from locus_fast.run.inputs import Inputs, Skipped
from locus_fast.run.model import choose_device, open_model, plan_run
from locus_fast.run.origin import Origin, source_of, source_on_disk
from locus_fast.run.plan import trained_by
from locus_fast.step.engine import Engine
from locus_fast.step.scoring import Scoring
from locus_fast.step.vocabulary import Vocabulary


@dataclass(frozen=True)
class Setup:
    """What a run works with, by use. Each part goes only to who needs it."""

    config: Config  # as asked for, with the rank of the adapters that are trained
    engine: Engine
    inputs: Inputs
    scoring: Scoring
    origin: Origin
    notes: tuple[str, ...]  # what the user should know before the run begins, one line each

    def evaluate(self, label: str, stop: Callable[[], bool]) -> Evaluation | None:
        """The model's answers to the held-out cues as it is now, see `run.evaluation`."""
        return evaluate(self.config, self.engine, self.inputs, self.scoring, label, stop)


def set_up(config: Config, out: Path | None = None) -> Setup:
    """Load everything a run needs; raises UserError for what cannot be used, as much of it as can be known
    before the weights are read.

    out: the folder of a training run, for which device and disk must have room; None to evaluate alone.
    """
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    source = source_on_disk(config)
    cues = cue_source(config)  # before a model is fetched: it is the quicker one to be wrong
    source = source or source_of(config)
    role = role_of(config, source, trains=out is not None)
    config = settle(config, source, role)
    prompter = prompter_of(config, source)
    plan = plan_run(config, source, device, out)
    model = open_model(config, source, device, role)
    table = build_token_table(source.tokenizer, model.lm_head.weight.shape[0]).to(device)
    scoring = Scoring.of(config, table, prompter.opening)
    vocabulary = Vocabulary.of(model, source.tokenizer, table, scoring.which, prompter.opening)
    engine = Engine.of(model, vocabulary, plan, config.rollout_tokens, trained_by(config))
    inputs, origin = Inputs(cues, prompter, Skipped()), Origin.of(config, source, role)
    notes = (cues.describe(), plan.reason, describe(config, source, role), describe_pixels(config, source))
    return Setup(config, engine, inputs, scoring, origin, tuple(filter(None, notes)))
