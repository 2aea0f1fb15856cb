"""Every loss, KL estimator and aggregation, its value and its gradient, against numbers worked out by hand.

Three replies of 3, 1 and 2 tokens, with advantages 1, -2 and 0.5, clipped to [0.8, 1.3]. The ratios, by
token:

    reply 0 (A = 1):    1.0   1.5 (above, held at 1.3)   0.5 (below, but a gain: not held)
    reply 1 (A = -2):   0.5 (below with a loss: held at 0.8)
    reply 2 (A = 0.5):  1.25  1.0
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from locus_fast.config import parse
from locus_fast.errors import UserError
from locus_fast.step.losses import AGGREGATIONS, LossInputs, Objective
from tests.locus_fast.step.loss_cases import double, objective

LENGTHS, LONGEST = [3, 1, 2], 4
ROW = [0, 0, 0, 1, 2, 2]
ADVANTAGE = [1.0, -2.0, 0.5]
RATIO = [1.0, 1.5, 0.5, 0.5, 1.25, 1.0]
LOGPROB = [-1.0, -0.5, -2.0, -0.7, -0.2, -0.4]


def inputs(weight: list[float], **given: Any) -> tuple[LossInputs, Tensor]:
    """(the three replies, weight by reply; their log-probs, which need a gradient), float64."""
    row = torch.tensor(ROW)
    logprob = double(LOGPROB).requires_grad_()
    fields = {
        "old": double(LOGPROB) - double(RATIO).log(),
        "reference": None,
        "advantage": double(ADVANTAGE)[row],
        "weight": double(weight)[row],
        "row": row,
        "lengths": torch.tensor(LENGTHS),
        "entropy": torch.zeros(6, dtype=torch.float64),
    }
    return LossInputs(**{**fields, "logprob": logprob, **given}), logprob


def batch_loss(
    loss: str, loss_agg: str, truncated: tuple[int, ...] = (), **numbers: float
) -> tuple[float, list[float]]:
    """(loss, gradient of each log-prob) of the three replies, the denominator included. truncated: replies
    that are left out."""
    counts = [reply not in truncated for reply in range(3)]
    kept = (torch.tensor(counts), counts) if truncated else None
    weight, denominator = AGGREGATIONS[loss_agg](torch.tensor(LENGTHS), LENGTHS, kept, LONGEST)
    given, logprob = inputs(weight.tolist())
    total, _ = objective(loss, **numbers)(given)
    (total / denominator).backward()
    assert logprob.grad is not None
    return total.item() / denominator, logprob.grad.tolist()


# GRPO's token losses are -1, -1.3, -0.5 | 1.6 | -0.625, -0.5, their slopes -1, 0, -0.5 | 0 | -0.625, -0.5.
# GSPO's ratios are (1 * 1.5 * 0.5)^(1/3) = 0.9085603, 0.5 (held at 0.8) and (1.25 * 1)^(1/2) = 1.1180340, so
# its token losses are -0.9085603 | 1.6 | -0.5590170, the same for each token of a reply; slopes the same, but
# 0 | reply 1. CISPO's weights are 1, 1.3, 0.5 | 0.5 | 1.25, 1 and its token losses -weight A log-prob: 1,
# 0.65, 1 | -0.7 | 0.125, 0.2, with the slopes -weight A: -1, -1.3, -0.5 | 1 | -0.625, -0.5: no token is
# without one.
TOKEN = {
    "grpo": ([-1.0, -1.3, -0.5, 1.6, -0.625, -0.5], [-1.0, 0.0, -0.5, 0.0, -0.625, -0.5]),
    "gspo": (
        [-0.9085602964, -0.9085602964, -0.9085602964, 1.6, -0.5590169944, -0.5590169944],
        [-0.9085602964, -0.9085602964, -0.9085602964, 0.0, -0.5590169944, -0.5590169944],
    ),
    "cispo": ([1.0, 0.65, 1.0, -0.7, 0.125, 0.2], [-1.0, -1.3, -0.5, 1.0, -0.625, -0.5]),
}
TOKEN |= dict.fromkeys(("bnpo", "dapo", "dr_grpo"), TOKEN["grpo"])
# Share of each token in the loss, the denominator included: 1/6 of all 6 tokens; 1/3 for a reply over its
# length; 1/3 for a reply over the longest one allowed, 4.
SHARE = {
    "token-mean": [1 / 6] * 6,
    "seq-mean-token-mean": [1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6, 1 / 6],
    "seq-mean-token-sum-norm": [1 / 12] * 6,
}
# The sums, by hand. GRPO: -2.325 over 6 and over 12; (-2.8 / 3 + 1.6 - 1.125 / 2) / 3. GSPO: (-2.7256809 +
# 1.6 - 1.1180340) over 6 and over 12; (-0.9085603 + 1.6 - 0.5590170) / 3. CISPO: 2.275 over 6 and over 12;
# (2.65 / 3 - 0.7 + 0.325 / 2) / 3.
LOSS = {
    "grpo": (-0.3875, 0.0347222222, -0.19375),
    "gspo": (-0.3739524797, 0.0441409031, -0.1869762398),
    "cispo": (0.3791666667, 0.1152777778, 0.1895833333),
}
LOSS |= dict.fromkeys(("bnpo", "dapo", "dr_grpo"), LOSS["grpo"])


@pytest.mark.parametrize("loss_agg", SHARE)
@pytest.mark.parametrize("loss", TOKEN)
def test_a_batch_of_unequal_replies(loss: str, loss_agg: str) -> None:
    value, gradient = batch_loss(loss, loss_agg)
    # the weights are float32
    assert value == pytest.approx(LOSS[loss][list(SHARE).index(loss_agg)], rel=1e-6)
    expected = [slope * share for slope, share in zip(TOKEN[loss][1], SHARE[loss_agg], strict=True)]
    assert gradient == pytest.approx(expected, rel=1e-6, abs=1e-12)


# Reply 0 cut at its longest: its tokens have no loss. Under the token mean they have no share in the
# denominator either: 3 tokens are left, GRPO's (1.6 - 1.125) / 3. Under both means over replies it stays in
# the denominator, 3 replies: (1.6 - 0.5625) / 3 and 0.475 / 4 / 3. So does TRL with
# `mask_truncated_completions`: its `bnpo` and `dapo` divide by the sum of the mask, its `grpo` takes the mean
# over all replies, of which the masked ones give 0, and its `dr_grpo` divides by all replies times the
# longest.
@pytest.mark.parametrize(
    ("loss_agg", "value", "shares"),
    [
        ("token-mean", 0.1583333333, [0, 0, 0, 1 / 3, 1 / 3, 1 / 3]),
        ("seq-mean-token-mean", 0.3458333333, [0, 0, 0, 1 / 3, 1 / 6, 1 / 6]),
        ("seq-mean-token-sum-norm", 0.0395833333, [0, 0, 0, 1 / 12, 1 / 12, 1 / 12]),
    ],
)
def test_truncated_replies_are_left_out(loss_agg: str, value: float, shares: list[float]) -> None:
    got, gradient = batch_loss("grpo", loss_agg, truncated=(0,))
    assert got == pytest.approx(value, rel=1e-6)
    expected = [slope * share for slope, share in zip(TOKEN["grpo"][1], shares, strict=True)]
    assert gradient == pytest.approx(expected, rel=1e-6, abs=1e-12)
    weight, denominator = AGGREGATIONS[loss_agg](
        torch.tensor([3, 1]), [3, 1], (torch.zeros(2).bool(), [False] * 2), 4
    )
    assert weight.tolist() == [0.0, 0.0]
    assert denominator == (0 if loss_agg == "token-mean" else 2)


@pytest.mark.parametrize(
    ("arguments", "loss_agg", "normalize_std"),
    [
        (["--loss", "grpo"], "token-mean", True),
        (["--loss", "dr_grpo"], "seq-mean-token-sum-norm", False),
        (["--loss", "dr_grpo", "--normalize-std", "true"], "seq-mean-token-sum-norm", True),
        (["--loss", "dr_grpo", "--loss-agg", "seq-mean-token-mean"], "seq-mean-token-mean", False),
        (["--loss", "bnpo"], "token-mean", True),
        (["--loss", "dapo"], "token-mean", True),
        (["--loss", "gspo"], "seq-mean-token-mean", True),
        (["--loss", "gspo", "--loss-agg", "token-mean"], "token-mean", True),
        (["--loss", "cispo"], "token-mean", True),
    ],
)
def test_a_loss_brings_its_settings(arguments: list[str], loss_agg: str, normalize_std: bool) -> None:
    config = parse(arguments)
    assert (config.loss_agg, config.normalize_std) == (loss_agg, normalize_std)


def test_bounds_of_0_are_off() -> None:
    made = Objective.of(parse(["--log-ratio-clamp", "0", "--kl-clamp", "0", "--delta", "0"]))
    assert made.delta == made.log_ratio_clamp == made.kl_clamp == math.inf
    made = Objective.of(
        parse(["--log-ratio-clamp", "3", "--kl-clamp", "4", "--delta", "2", "--clip-high", "0.5"])
    )
    assert (made.log_ratio_clamp, made.kl_clamp, made.delta, made.clip_high) == (3, 4, 2, 0.5)


@pytest.mark.parametrize("arguments", [["--delta", "1.3"], ["--delta", "2", "--clip-high", "1"]])
def test_a_two_sided_clip_within_the_one_sided_is_refused(arguments: list[str]) -> None:
    """Of min(min(ratio, delta) A, clip(ratio) A), a delta below 1 + clip_high would hold the ratio where the
    advantage is positive, and have no effect where it is negative."""
    with pytest.raises(UserError, match="--delta must be above 1 \\+ --clip-high"):
        parse(arguments)
    assert parse(["--delta", "2.1", "--clip-high", "1"]).delta == 2.1
