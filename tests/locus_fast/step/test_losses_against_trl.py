"""Loss and gradient against TRL's own `GRPOTrainer._compute_loss`, on random log-probs in float64.

The trainer is not set up: its loss reads a dozen attributes and the log-probs of a forward pass, all of which
are given here. TRL divides by the batch's denominator within the loss and takes padded replies with a mask;
here the tokens are packed, `Objective` returns the weighted sum, and the optimizer's step divides it by the
denominator that `AGGREGATIONS` gives. So what is compared is sum / denominator. TRL's names: its `epsilon` is
clip_low, its `epsilon_high` clip_high, but for CISPO the largest weight itself, 1 + clip_high; `beta` is
kl_coef."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from locus_fast.config.presets import LOSS_SETTINGS
from locus_fast.step.losses import AGGREGATIONS, LossInputs, Objective

LENGTHS = [4, 1, 8, 2, 4, 1]  # powers of two: their reciprocals, which are float32 weights, are exact
LONGEST = 8  # tokens of a padded reply, and the longest that was allowed
LOW, HIGH, BETA = 0.2, 0.3, 0.05
# of TRL's loss types that fix no other
OUR_AGGREGATION = {
    "grpo": "seq-mean-token-mean",
    "cispo": "token-mean",
}
OUR_AGGREGATION |= {name: LOSS_SETTINGS[name]["loss_agg"] for name in ("bnpo", "dapo", "dr_grpo")}


@pytest.fixture(scope="module")
def trainer_class() -> Any:
    return pytest.importorskip("trl").GRPOTrainer


class OneProcess:
    """What the loss asks of `accelerate` where there is one process."""

    num_processes, sync_gradients = 1, True

    def gather(self, x: Tensor) -> Tensor:
        return x

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x


def batch(truncated: bool) -> dict[str, Tensor]:
    """Padded log-probs [6, 8] that are far enough apart for every bound, and which replies count [6]."""
    generator = torch.Generator().manual_seed(3)
    shape = (len(LENGTHS), LONGEST)
    logprob = -torch.rand(shape, generator=generator, dtype=torch.float64) * 4
    old, reference = (logprob + 0.6 * torch.randn(shape, generator=generator).double() for _ in range(2))
    return {
        "logprob": logprob,
        "old": old,
        "reference": reference,
        "advantage": torch.tensor([1.0, -1.2, -0.4, 0.9, -2.0, 0.3], dtype=torch.float64),
        "mask": torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None],
        "kept": torch.tensor([True, True, not truncated, True, True, not truncated]),
        "entropy": torch.rand(shape, generator=generator, dtype=torch.float64),
    }


def by_trl(trainer_class: Any, loss_type: str, level: str, given: dict[str, Tensor], **settings: Any) -> Any:
    """(loss, gradient [6, 8], metrics) of TRL. settings: delta, beta, entropy_coef."""
    trainer = object.__new__(trainer_class)
    logprob = given["logprob"].clone().requires_grad_()
    entropy_coef = settings.get("entropy_coef", 0.0)
    attributes = {
        "args": SimpleNamespace(
            delta=settings.get("delta"), use_bias_correction_kl=False, steps_per_generation=1
        ),
        "accelerator": OneProcess(),
        "model": SimpleNamespace(training=True),
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": settings.get("beta", 0.0),
        "epsilon_low": LOW,
        "epsilon_high": 1 + HIGH if loss_type == "cispo" else HIGH,
        "max_completion_length": LONGEST,
        "current_gradient_accumulation_steps": 1,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "aux_loss_enabled": False,
        "use_adaptive_entropy": False,
        "entropy_coef": entropy_coef,
        "_entropy_bonus_enabled": entropy_coef > 0,
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprob, given["entropy"], None),
    }
    for name, value in attributes.items():
        setattr(trainer, name, value)
    # as TRL does for `mask_truncated_completions`, before the loss
    mask = given["mask"] * given["kept"][:, None]
    prompt = torch.ones(len(LENGTHS), 1, dtype=torch.int64)
    loss = trainer._compute_loss(
        None,
        {
            "prompt_ids": prompt,
            "prompt_mask": prompt,
            "completion_ids": torch.zeros(mask.shape, dtype=torch.int64),
            "completion_mask": mask.long(),
            "advantages": given["advantage"],
            "old_per_token_logps": given["old"],
            "ref_per_token_logps": given["reference"],
            "num_items_in_batch": mask.sum(),
        },
    )
    loss.backward()
    return loss.item(), logprob.grad, {name: values[0] for name, values in trainer._metrics["train"].items()}


def by_ours(loss: str, loss_agg: str, given: dict[str, Tensor], **settings: Any) -> Any:
    """(loss, gradient [6, 8], metrics) of the same, packed, divided by the denominator."""
    mask = given["mask"]
    row = torch.arange(len(LENGTHS))[:, None].expand_as(mask)[mask]
    counts = given["kept"].tolist()
    kept = None if all(counts) else (given["kept"], counts)
    lengths = torch.tensor(LENGTHS)
    weight, denominator = AGGREGATIONS[loss_agg](lengths, LENGTHS, kept, LONGEST)
    objective = Objective(
        loss=loss,
        kl_estimator="k3",
        clip_low=LOW,
        clip_high=HIGH,
        delta=settings.get("delta") or math.inf,
        kl_coef=settings.get("beta", 0.0),
        entropy_coef=settings.get("entropy_coef", 0.0),
        log_ratio_clamp=math.inf,
        kl_clamp=math.inf,
    )
    logprob = given["logprob"].clone().requires_grad_()
    inputs = LossInputs(
        logprob=logprob[mask],
        old=given["old"][mask],
        reference=given["reference"][mask] if objective.kl_coef else None,
        advantage=given["advantage"][row],
        weight=weight.double()[row],
        row=row,
        lengths=lengths,
        entropy=given["entropy"][mask],
    )
    total, metrics = objective(inputs)
    (total / denominator).backward()
    return total.item() / denominator, logprob.grad, metrics


def assert_same(ours: Any, trl: Any) -> None:
    assert ours[0] == pytest.approx(trl[0], rel=1e-12, abs=1e-14)
    torch.testing.assert_close(ours[1], trl[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "cispo"])
def test_loss_and_gradient(
    loss_type: str, truncated: bool, beta: float, delta: float | None, trainer_class: Any
) -> None:
    """With and without the KL, two-sided clip, which CISPO does not have, and masked replies."""
    given = batch(truncated)
    trl = by_trl(trainer_class, loss_type, "token", given, delta=delta, beta=beta)
    ours = by_ours(loss_type, OUR_AGGREGATION[loss_type], given, delta=delta, beta=beta)
    assert_same(ours, trl)
    ratio = (given["logprob"] - given["old"]).exp()[given["mask"]]
    assert (ratio < 1 - LOW).any()
    assert (ratio > 1.5).any()  # every bound acts


@pytest.mark.parametrize("delta", [None, 1.35])
@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_gspo(loss_type: str, truncated: bool, beta: float, delta: float | None, trainer_class: Any) -> None:
    """TRL's `importance_sampling_level="sequence"` differentiates the reply's ratio itself, which gives each
    of its n tokens 1/n of a slope in each of n equal token losses; here each token has the whole slope in its
    own, and none in the others (the stop-gradient form). The sums are equal wherever the tokens of a reply
    share weight and advantage."""
    given = batch(truncated)
    trl = by_trl(trainer_class, loss_type, "sequence", given, delta=delta, beta=beta)
    assert_same(by_ours("gspo", OUR_AGGREGATION[loss_type], given, delta=delta, beta=beta), trl)


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo", "cispo"])
def test_entropy_bonus(loss_type: str, trainer_class: Any) -> None:
    """TRL's bonus is the mean over the tokens whatever the loss type. Here it is a part of the token's loss
    and has its weight, so the two agree under the token mean alone."""
    given = batch(truncated=True)
    trl = by_trl(trainer_class, loss_type, "token", given, entropy_coef=0.02)
    assert_same(by_ours(loss_type, "token-mean", given, entropy_coef=0.02), trl)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_metrics(level: str, trainer_class: Any) -> None:
    """The mean KL, and the share of tokens at each bound; for GSPO, TRL gives that of the replies."""
    given = batch(truncated=False)
    _, _, trl = by_trl(trainer_class, "bnpo", level, given, beta=BETA)
    _, _, ours = by_ours("gspo" if level == "sequence" else "grpo", "token-mean", given, beta=BETA)
    assert ours["kl"].item() / sum(LENGTHS) == pytest.approx(trl["kl"], rel=1e-6)
    if level == "token":
        assert ours["clip_low"].item() / sum(LENGTHS) == pytest.approx(trl["clip_ratio/low_mean"])
        assert ours["clip_high"].item() / sum(LENGTHS) == pytest.approx(trl["clip_ratio/high_mean"])
        assert 0 < ours["clip_low"].item() < sum(LENGTHS)
        assert 0 < ours["clip_high"].item() < sum(LENGTHS)
