"""A whole step's loss, metrics and gradient are those of a plain loop: every prompt and its images again for
every reply, through transformers alone, and the objective spelled out."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from locus_fast import train
from locus_fast.config import parse
from locus_fast.model.families import PARTS
from locus_fast.model.reference import make_reference
from locus_fast.run.report import Progress
from locus_fast.run.setup import set_up
from locus_fast.step.optim import parameter_groups
from locus_fast.step.optimizers import make_optimizer
from locus_fast.step.scoring import Scoring
from locus_fast.step.step import Step
from tests.small_models import naive_logprob

KL, PROMPTS, GROUP = 0.05, 5, 4
EQUAL = {"some": [True, False, True, True, False], "none": [False] * 5, "all": [True] * 5}


def step(options: list[str], equal: list[bool], monkeypatch: pytest.MonkeyPatch):
    """(metrics, gradients, rollouts by prompt, advantages [prompts, group], policy and base as they were):
    one step of a policy that is off its base, with given advantages."""
    sizes = [
        "--prompts",
        str(PROMPTS),
        "--group-size",
        str(GROUP),
        "--microbatch-tokens",
        "1500",
        "--kl-coef",
        str(KL),
    ]
    setup = set_up(parse([*sizes, "--max-grad-norm", "1e9", "--lr", "1e-9", "--device", "cpu", *options]))
    base = copy.deepcopy(setup.engine.model)
    reference = make_reference(setup.engine.model)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in setup.engine.model.parameters():
            p.mul_(1 + 0.03 * torch.randn(p.shape, generator=rng))
    policy = copy.deepcopy(setup.engine.model)
    advantage = torch.randn(PROMPTS, GROUP, generator=rng) * ~torch.tensor(equal)[:, None]
    places: list[list[int]] = []
    rollouts: dict[int, tuple[torch.Tensor, list[int]]] = {}
    generate, reward = setup.engine.decoder.generate, Scoring.reward

    def recorded(prefix, sampling, *, seed, groups):
        rollout = generate(prefix, sampling, seed=seed, groups=groups)
        places.append(list(groups))
        for place, group in enumerate(groups):
            rows = slice(place * GROUP, (place + 1) * GROUP)
            rollouts[group] = rollout.ids[rows], rollout.lengths[rows].tolist()
        return rollout

    def given(*arguments):
        chosen = torch.tensor(places[-1])
        zero_variance = torch.tensor(equal)[chosen]
        return reward(*arguments)._replace(advantage=advantage[chosen].flatten(), zero_variance=zero_variance)

    setup.engine.decoder.generate = recorded
    monkeypatch.setattr(Scoring, "reward", given)
    optimizer = make_optimizer("adamw", parameter_groups(setup.engine.model, dict.fromkeys(PARTS, 1e-9)), 0.0)
    prompts = [setup.inputs.prompter(setup.inputs.cues.train(i)) for i in range(PROMPTS)]
    numbers = Step(setup.config, setup.engine, setup.scoring, reference, optimizer)(
        prompts, 0, 0.0, lambda: False
    )
    gradients = {name: p.grad for name, p in setup.engine.model.named_parameters()}
    replies = [[ids[:n] for ids, n in zip(*rollouts[group], strict=True)] for group in range(PROMPTS)]
    return numbers, gradients, prompts, replies, advantage, policy, base


@pytest.mark.parametrize("mean", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("which", EQUAL)
def test_a_step_is_the_objective(which: str, skip: bool, mean: str, monkeypatch, tmp_path: Path) -> None:
    """The KL holds every group's tokens; with --skip-zero-variance only those of groups whose rewards differ.
    The loss is the weighted sum over the whole batch's denominator in either case."""
    options = ["--loss-agg", mean, "--skip-zero-variance", str(skip).lower()]
    numbers, gradients, prompts, replies, advantage, policy, base = step(options, EQUAL[which], monkeypatch)
    assert numbers is not None
    logprob = naive_logprob(policy, prompts, replies)
    with torch.no_grad():
        reference = naive_logprob(base, prompts, replies)
    count = sum(len(reply) for group in replies for reply in group)
    loss, kl, held = torch.zeros(()), 0.0, 0
    for row, (mine, anchor) in enumerate(zip(logprob, reference, strict=True)):
        group = row // GROUP
        if EQUAL[which][group] and skip:
            continue
        log_ratio = anchor - mine
        k3 = log_ratio.exp() - log_ratio - 1
        token = -(mine - mine.detach()).exp() * advantage.flatten()[row] + KL * k3
        share = 1 / count if mean == "token-mean" else 1 / (len(mine) * PROMPTS * GROUP)
        loss = loss + share * token.sum()
        kl, held = kl + k3.sum().item(), held + len(mine)
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-7)
    assert numbers["zero_variance_groups"] == sum(EQUAL[which])
    assert numbers["kl"] == pytest.approx(kl / max(held, 1), rel=1e-4)
    if held == 0:
        assert numbers["grad_norm"] == 0
        return
    policy.zero_grad()
    loss.backward()
    expected = {name: p.grad for name, p in policy.named_parameters()}
    norm = math.sqrt(sum(value.square().sum().item() for value in expected.values()))
    assert numbers["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, value in expected.items():
        assert (gradients[name] - value).norm() <= 2e-4 * value.norm() + 1e-7 * norm, name


def test_rewards_that_are_all_equal_are_said_once(tmp_path: Path, monkeypatch, capsys) -> None:
    """A run whose replies are never a box: what is wrong, once, though it goes on."""
    monkeypatch.setattr(Progress, "EQUAL_STEPS", 2)
    sizes = [
        "--steps",
        "5",
        "--prompts",
        "2",
        "--group-size",
        "2",
        "--eval-cues",
        "4",
        "--max-new-tokens",
        "3",
    ]
    assert train.main([*sizes, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert said.count("for 2 steps all replies of a group have earned the same reward") == 1
    assert "no reply holds a box that can be read" in said
    assert "--max-new-tokens" in said
