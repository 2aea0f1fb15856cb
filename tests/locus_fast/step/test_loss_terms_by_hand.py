"""Terms of the losses by hand: bounds, ratios of GSPO and CISPO, KL estimators, clamps, entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from locus_fast.step.losses import KL_ESTIMATORS, LossInputs
from tests.locus_fast.step.loss_cases import double, objective

LN2 = math.log(2)
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
