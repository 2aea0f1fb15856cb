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
from locus_fast.step.losses import AGGREGATIONS, KL_ESTIMATORS, LossInputs, Objective

LENGTHS, LONGEST = [3, 1, 2], 4
ROW = [0, 0, 0, 1, 2, 2]
ADVANTAGE = [1.0, -2.0, 0.5]
RATIO = [1.0, 1.5, 0.5, 0.5, 1.25, 1.0]
LOGPROB = [-1.0, -0.5, -2.0, -0.7, -0.2, -0.4]
LN2 = math.log(2)
OFF = {"clip_low": 0.2, "clip_high": 0.3, "delta": math.inf, "kl_coef": 0.0, "entropy_coef": 0.0}
OFF |= {"log_ratio_clamp": math.inf, "kl_clamp": math.inf}


def objective(loss: str, kl_estimator: str = "k3", **numbers: float) -> Objective:
    """A loss with the bounds above, and all else off unless it is given."""
    return Objective(loss=loss, kl_estimator=kl_estimator, **{**OFF, **numbers})


def double(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


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


ONE = [  # delta, ratio, advantage, loss, slope, counted as clip_low, as clip_high
    (math.inf, 1.5, -1.5, 2.25, 2.25, False, False),  # above with a loss: not held
    (2.0, 1.5, -1.5, 2.25, 2.25, False, False),  # -min(1.5 * -1.5, 1.3 * -1.5)
    (2.0, 3.0, -1.5, 3.0, 0.0, False, True),  # -min(2 * -1.5, 1.3 * -1.5): held at delta
    (math.inf, 3.0, -1.5, 4.5, 4.5, False, False),
    (2.0, 3.0, 1.5, -1.95, 0.0, False, True),  # -min(2 * 1.5, 1.3 * 1.5): the upper bound, as without delta
    (2.0, 1.2, 1.5, -1.8, -1.8, False, False),
    (2.0, 0.5, -1.5, 1.2, 0.0, True, False),  # -min(0.5 * -1.5, 0.8 * -1.5)
    (2.0, 0.5, 1.5, -0.75, -0.75, False, False),
    (2.0, 3.0, 0.0, 0.0, 0.0, False, False),
]


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
@pytest.mark.parametrize("case", ONE)
def test_each_bound_with_each_sign(case: tuple, loss: str) -> None:
    """One token, for which GSPO is GRPO. delta counts only where the advantage is negative."""
    delta, ratio, advantage, expected, slope, low, high = case
    logprob = double([-1.0 + math.log(ratio)]).requires_grad_()
    one, old = torch.zeros(1, dtype=torch.int64), double([-1.0])
    given = LossInputs(logprob, old, None, double([advantage]), double([1.0]), one, one + 1, double([0.0]))
    value, metrics = objective(loss, delta=delta)(given)
    value.backward()
    assert value.item() == pytest.approx(expected, abs=1e-12)
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(slope, abs=1e-12)
    assert (metrics["clip_low"].item(), metrics["clip_high"].item()) == (low, high)
    assert metrics["ratio_max"].item() == pytest.approx(ratio)


def test_the_ratio_of_gspo_is_the_replys() -> None:
    """Ratios 2 and 1.2 have the geometric mean 2.4^(1/2) = 1.5491933. With a gain both tokens are held at
    1.3, the one within the bounds too; with a loss neither is, and a token's slope is -1.5491933 A. The
    derivative of the reply's ratio by one of its two log-probs is half of that: the stop-gradient form has it
    summed over the tokens."""
    for advantage, each, slope in [(0.5, -0.65, 0.0), (-2.0, 3.0983866770, 3.0983866770)]:
        logprob = double([-1.0, -1.0]).requires_grad_()
        old = double([-1.0, -1.0]) - double([2.0, 1.2]).log()
        row = torch.zeros(2, dtype=torch.int64)
        fields = (double([advantage] * 2), double([1.0, 1.0]), row, torch.tensor([2]), double([0.0, 0.0]))
        value, metrics = objective("gspo")(LossInputs(logprob, old, None, *fields))
        value.backward()
        assert value.item() == pytest.approx(2 * each)
        assert logprob.grad is not None
        assert logprob.grad.tolist() == pytest.approx([slope, slope], rel=1e-9)
        assert metrics["ratio_max"].item() == pytest.approx(1.5491933385)
        assert metrics["clip_high"].item() == (2 if advantage > 0 else 0)


def test_gspo_reads_only_the_replies_that_have_tokens() -> None:
    """Replies of groups that are left out keep their place: their lengths have no influence, not even 0."""
    row, weight = torch.tensor([1, 1, 3]), double([1.0, 1.0, 1.0])
    logprob = double([-1.0, -1.0, -1.0]).requires_grad_()
    old = logprob.detach() - double([0.9, 1.6, 1.1]).log()
    lengths = torch.tensor([7, 2, 0, 1])
    fields = (double([-1.0, -1.0, 1.0]), weight, row, lengths, double([0.0] * 3))
    value, _ = objective("gspo")(LossInputs(logprob, old, None, *fields))
    assert value.item() == pytest.approx(1.2 + 1.2 - 1.1)  # (0.9 * 1.6)^(1/2) = 1.2


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_the_weight_of_cispo_has_no_gradient(advantage: float) -> None:
    """Weights min(ratio, 1 + 4) of ratios 0.01, 3 and 9, whatever the advantage's sign: 0.01, 3 and 5.
    clip_low has no effect. The gradient is -weight A, for the held token too: no derivative of the weight in
    it."""
    ratio, logprob = double([0.01, 3.0, 9.0]), double([-2.0, -3.0, -4.0]).requires_grad_()
    row = torch.zeros(3, dtype=torch.int64)
    fields = (double([advantage] * 3), double([1.0] * 3), row, torch.tensor([3]), double([0.0] * 3))
    given = LossInputs(logprob, logprob.detach() - ratio.log(), None, *fields)
    value, metrics = objective("cispo", clip_low=0.2, clip_high=4.0)(given)
    value.backward()
    assert value.item() == pytest.approx(advantage * (0.01 * 2 + 3 * 3 + 5 * 4))
    assert logprob.grad is not None
    assert logprob.grad.tolist() == pytest.approx([-0.01 * advantage, -3 * advantage, -5 * advantage])
    assert (metrics["clip_low"].item(), metrics["clip_high"].item()) == (0, 1)


# Of x = log(reference / policy) = ln 2, -ln 2 and 0: k1 = -x, slope 1; k2 = x^2 / 2, slope -x; k3 = e^x - x -
# 1, slope 1 - e^x. Slopes by the policy's log-prob, by which x falls.
KL = {
    "k1": ([-0.6931471806, 0.6931471806, 0.0], [1.0, 1.0, 1.0]),
    "k2": ([0.2402265070, 0.2402265070, 0.0], [-0.6931471806, 0.6931471806, 0.0]),
    "k3": ([0.3068528194, 0.1931471806, 0.0], [-1.0, 0.5, 0.0]),
}


def with_kl(
    estimator: str, log_ratio: list[float], **clamps: float
) -> tuple[float, list[float], dict[str, Tensor]]:
    """(loss, gradient, metrics) of tokens some nats below their reference: advantage 0, coefficient 0.5."""
    n = len(log_ratio)
    logprob = torch.full((n,), -1.0, dtype=torch.float64, requires_grad=True)
    row = torch.zeros(n, dtype=torch.int64)
    fields = (double([0.0] * n), double([2.0] * n), row, torch.tensor([n]), double([0.0] * n))
    given = LossInputs(logprob, logprob.detach(), double([-1.0 + x for x in log_ratio]), *fields)
    value, metrics = objective("grpo", estimator, kl_coef=0.5, **clamps)(given)
    value.backward()
    assert logprob.grad is not None
    return value.item(), logprob.grad.tolist(), metrics


@pytest.mark.parametrize("estimator", KL)
def test_kl_estimators(estimator: str) -> None:
    values, slopes = KL[estimator]
    log_ratio = [LN2, -LN2, 0.0]
    assert KL_ESTIMATORS[estimator](double(log_ratio)).tolist() == pytest.approx(values)
    loss, gradient, metrics = with_kl(estimator, log_ratio)
    assert loss == pytest.approx(0.5 * 2 * sum(values))
    assert gradient == pytest.approx([0.5 * 2 * slope for slope in slopes])
    assert metrics["kl"].item() == pytest.approx(sum(values))  # per token, whatever its weight
    assert metrics["kl_clamped"].item() == 0


# 1, -1, 3 and -3 nats, the log-ratio clamped to 2 and the estimate to 1.5. k1 is -1, 1, and -2, 2 held at
# -1.5, 1.5; k2 is 0.5, 0.5, and 2 held at 1.5; k3 is e - 2 = 0.7182818, 1 / e = 0.3678794, e^2 - 3 = 4.389
# held at 1.5, and at -3 nats e^-2 + 1 = 1.1353353, which only the log-ratio's clamp holds.
CLAMPED = {
    "k1": ([-1.0, 1.0, -1.5, 1.5], [1.0, 1.0, 0.0, 0.0]),
    "k2": ([0.5, 0.5, 1.5, 1.5], [-1.0, 1.0, 0.0, 0.0]),
    "k3": ([0.7182818285, 0.3678794412, 1.5, 1.1353352832], [-1.7182818285, 0.6321205588, 0.0, 0.0]),
}


@pytest.mark.parametrize("estimator", CLAMPED)
def test_a_kl_past_a_clamp_has_no_gradient(estimator: str) -> None:
    values, slopes = CLAMPED[estimator]
    loss, gradient, metrics = with_kl(estimator, [1.0, -1.0, 3.0, -3.0], log_ratio_clamp=2.0, kl_clamp=1.5)
    assert loss == pytest.approx(sum(values))
    assert gradient == pytest.approx(slopes, abs=1e-9)
    assert metrics["kl_clamped"].item() == 2


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_a_ratio_past_its_clamp_has_no_gradient(loss: str) -> None:
    """3 nats above, clamped to 2, with a loss: e^2 = 7.3890561 times 1.5, and no gradient."""
    logprob, row = double([-1.0]).requires_grad_(), torch.zeros(1, dtype=torch.int64)
    given = LossInputs(
        logprob, double([-4.0]), None, double([-1.5]), double([1.0]), row, row + 1, double([0.0])
    )
    value, metrics = objective(loss, log_ratio_clamp=2.0)(given)
    value.backward()
    assert value.item() == pytest.approx(11.0835841484)
    assert logprob.grad is not None
    assert logprob.grad.item() == 0
    assert metrics["ratio_clamped"].item() == 1


def test_the_entropy_bonus_of_two_words() -> None:
    """Logits (ln 3, 0): p = (3/4, 1/4), H = 2 ln 2 - 3/4 ln 3 = 0.5623351. The loss is -0.1 H, and its
    derivative by a logit 0.1 p (ln p + H): 0.1 * 0.75 * (-0.2876821 + 0.5623351) = 0.0205990 and its
    opposite."""
    hidden, head = double([[1.0]]).requires_grad_(), double([[math.log(3)], [0.0]]).requires_grad_()
    row = torch.zeros(1, dtype=torch.int64)
    rest = {"old": None, "reference": None, "advantage": double([0.0]), "weight": double([1.0])}
    rest |= {"row": row, "lengths": row + 1}
    loss, logprob, metrics = objective("grpo", entropy_coef=0.1).from_hidden(hidden, head, row, 1.0, rest)
    loss.backward()
    assert loss.item() == pytest.approx(-0.0562335145)
    assert metrics["entropy"].item() == pytest.approx(0.5623351446)
    assert logprob.item() == pytest.approx(-0.2876820724)
    assert head.grad is not None
    assert head.grad.flatten().tolist() == pytest.approx([0.0205989804, -0.0205989804])


def test_the_entropys_gradient_through_the_head() -> None:
    """Of the hidden states and the head, by central differences of a plain loop over the words, float64."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (3, 7))
    temperature, weight = 0.7, [0.5, 0.5, 1.0]

    def by_loop() -> float:
        total = 0.0
        for state, share in zip(hidden.tolist(), weight, strict=True):
            logits = [
                sum(a * b for a, b in zip(state, word, strict=True)) / temperature for word in head.tolist()
            ]
            normaliser = math.log(sum(math.exp(y) for y in logits))
            total -= 0.3 * share * -sum(math.exp(y - normaliser) * (y - normaliser) for y in logits)
        return total

    leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    rest = {"old": None, "reference": None, "advantage": torch.zeros(3).double(), "weight": double(weight)}
    rest |= {"row": torch.tensor([0, 0, 1]), "lengths": torch.tensor([2, 1])}
    ids = torch.tensor([6, 0, 2])
    loss, _, _ = objective("grpo", entropy_coef=0.3).from_hidden(*leaves, ids, temperature, rest)
    loss.backward()
    assert loss.item() == pytest.approx(by_loop(), rel=1e-12)
    for values, leaf in zip((hidden, head), leaves, strict=True):
        assert leaf.grad is not None
        for place in range(values.numel()):
            ends = []
            for change in (1e-5, -1e-5):
                values.view(-1)[place] += change
                ends.append(by_loop())
                values.view(-1)[place] -= change
            assert leaf.grad.view(-1)[place].item() == pytest.approx(
                (ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-9
            )


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
