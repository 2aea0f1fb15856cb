"""The objective against values computed by hand, and its gradient against finite differences in float64."""

from __future__ import annotations

import math

import pytest
import torch
from locus_kernels.box_reward import group_advantage

from locus_fast.step.losses import AGGREGATIONS, k3
from tests.objective import grpo_loss


def test_k3_by_hand() -> None:
    logprob, reference = torch.log(torch.tensor([0.5, 0.2, 0.4])), torch.log(torch.tensor([0.25, 0.4, 0.4]))
    expected = [0.5 - math.log(0.5) - 1, 2.0 - math.log(2.0) - 1, 0.0]
    torch.testing.assert_close(k3(reference - logprob), torch.tensor(expected))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "low", "high"),
    [
        (1.0, 2.0, -2.0, False, False),
        (1.1, 2.0, -2.2, False, False),
        (1.5, 2.0, -2.6, False, True),  # above 1 + 0.3 with a gain: held at 1.3
        (1.5, -2.0, 3.0, False, False),  # above with a loss: not held, the step back is welcome
        (0.5, -2.0, 1.6, True, False),  # below 1 - 0.2 with a loss: held at 0.8
        (0.5, 2.0, -1.0, False, False),  # below with a gain: not held
        (1.3, 1.0, -1.3, False, False),
    ],
)
def test_clip_on_each_side_by_hand(
    ratio: float, advantage: float, loss: float, low: bool, high: bool
) -> None:
    logprob = torch.tensor([-1.0 + math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old, gain = torch.tensor([[-1.0], [advantage]], dtype=torch.float64)
    total, metrics = grpo_loss(
        logprob,
        old=old,
        reference=None,
        advantage=gain,
        weight=torch.ones_like(gain),
        clip_low=0.2,
        clip_high=0.3 + 1e-9,
        kl_coefficient=0.0,
    )
    assert total.item() == pytest.approx(loss)
    assert metrics["ratio_max"].item() == pytest.approx(ratio)
    assert (metrics["clip_low"].item(), metrics["clip_high"].item()) == (low, high)
    total.backward()
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(0.0 if low or high else -ratio * advantage)


def test_advantages_by_hand() -> None:
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.3, 0.3, 0.3, 0.3])
    deviation = math.sqrt(4 * 0.25 / 3)
    advantage, equal = group_advantage(reward, 4)
    torch.testing.assert_close(advantage[:4], torch.tensor([0.5, -0.5, -0.5, 0.5]) / (deviation + 1e-6))
    assert advantage[4:].tolist() == [0.0] * 4
    assert equal.tolist() == [False, True]
    plain, _ = group_advantage(reward, 4, normalize_std=False)
    assert plain.tolist() == [0.5, -0.5, -0.5, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    """With old = current and no KL term, d loss / d logprob = -advantage * weight."""
    logprob = torch.randn(9, dtype=torch.float64, requires_grad=True)
    advantage, weight = torch.randn(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64)
    loss, metrics = grpo_loss(
        logprob,
        old=logprob.detach(),
        reference=None,
        advantage=advantage,
        weight=weight,
        clip_low=0.2,
        clip_high=0.3,
        kl_coefficient=0.0,
    )
    loss.backward()
    torch.testing.assert_close(logprob.grad, -advantage * weight)
    assert metrics["ratio_max"].item() == 1.0
    assert metrics["clip_low"].item() == metrics["clip_high"].item() == metrics["kl"].item() == 0


def test_gradient_against_finite_differences() -> None:
    torch.manual_seed(5)
    old, reference, advantage, weight = (torch.randn(40, dtype=torch.float64) * 0.3 for _ in range(4))
    logprob = (old + torch.randn(40, dtype=torch.float64) * 0.4).requires_grad_()
    ratio = (logprob.detach() - old).exp()
    assert ((ratio - 0.8).abs() > 1e-4).all()  # finite differences know nothing of the corners
    assert ((ratio - 1.3).abs() > 1e-4).all()

    def loss(value: torch.Tensor) -> torch.Tensor:
        return grpo_loss(
            value,
            old=old,
            reference=reference,
            advantage=advantage,
            weight=weight.abs(),
            clip_low=0.2,
            clip_high=0.3,
            kl_coefficient=0.07,
        )[0]

    assert torch.autograd.gradcheck(loss, (logprob,))


def test_metrics_count_tokens() -> None:
    old = torch.zeros(4)
    logprob = torch.log(torch.tensor([1.5, 0.5, 1.5, 1.0]))
    _, metrics = grpo_loss(
        logprob,
        old=old,
        reference=torch.zeros(4),
        advantage=torch.tensor([1.0, -1.0, -1.0, 1.0]),
        weight=torch.ones(4),
        clip_low=0.2,
        clip_high=0.3,
        kl_coefficient=0.1,
    )
    assert (metrics["clip_high"].item(), metrics["clip_low"].item()) == (1, 1)
    assert metrics["ratio_max"].item() == pytest.approx(1.5)
    assert metrics["kl"].item() == pytest.approx(
        0.5
        - math.log(1.5)
        + 2
        - 1
        - math.log(2)
        + 1 / 1.5
        - 1
        + math.log(1.5)
        + 1 / 1.5
        - 1
        + math.log(1.5)
        - (0.5 - math.log(1.5))
    )


# nats of the policy above its reference, or old policy
FAR = [
    0.0,
    2.0,
    -2.0,
    -19.0,
    -40.0,
    40.0,
    100.0,
    -100.0,
]


def far(advantage: float, **clamps: float) -> tuple[dict[str, torch.Tensor], list[float]]:
    """(metrics, gradient of each log-prob), float64, of tokens that are FAR from both."""
    logprob = torch.full((len(FAR),), -1.0, dtype=torch.float64, requires_grad=True)
    other = -1.0 - torch.tensor(FAR, dtype=torch.float64)
    every = torch.full_like(other, advantage)
    numbers = {"clip_low": 0.2, "clip_high": 0.3, "kl_coefficient": 0.5, **clamps}
    loss, metrics = grpo_loss(
        logprob, old=other, reference=other, advantage=every, weight=torch.ones_like(other), **numbers
    )
    loss.backward()
    assert logprob.grad is not None
    return metrics, logprob.grad.tolist()


def test_log_ratios_and_kl_are_clamped_by_hand() -> None:
    """exp(-d) + d - 1 at d nats: 1.135, 4.389 and, clamped, 10 at -19, -40 and -100 nats and at 40 and 100,
    where it would be 19 with the log-ratio at 20. The ratio's gradient is that of a loss where it is large:
    -A exp(d)."""
    metrics, gradient = far(-1.0, log_ratio_clamp=20.0, kl_clamp=10.0)
    assert metrics["kl"].item() == pytest.approx(0 + math.exp(-2) + 1 + math.exp(2) - 3 + 5 * 10)
    assert metrics["kl_clamped"].item() == 5
    assert metrics["ratio_clamped"].item() == 4
    assert metrics["ratio_max"].item() == pytest.approx(math.exp(20))
    kl = [0.0, 0.5 * (1 - math.exp(-2)), 0.5 * (1 - math.exp(2)), 0.0, 0.0, 0.0, 0.0, 0.0]
    # A < 0: the lower bound stops ratios below 0.8
    surrogate = [
        1.0,
        math.exp(2),
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ]
    assert gradient == pytest.approx([a + b for a, b in zip(kl, surrogate, strict=True)])


def test_clamps_are_off_by_a_number() -> None:
    metrics, gradient = far(1.0, log_ratio_clamp=math.inf, kl_clamp=math.inf)
    assert metrics["kl_clamped"].item() == metrics["ratio_clamped"].item() == 0
    assert gradient[4] == pytest.approx(-0.5 * math.exp(40) - math.exp(-40), rel=1e-9)
    metrics, gradient = far(1.0, log_ratio_clamp=50.0, kl_clamp=math.inf)
    assert metrics["kl_clamped"].item() == metrics["ratio_clamped"].item() == 2
    assert gradient[6:] == [0.0, 0.0]


def test_no_tokens() -> None:
    empty = torch.empty(0, requires_grad=True)
    loss, metrics = grpo_loss(
        empty,
        old=empty,
        reference=empty,
        advantage=empty,
        weight=empty,
        clip_low=0.2,
        clip_high=0.3,
        kl_coefficient=0.1,
    )
    assert loss.item() == 0
    assert metrics["kl"].item() == 0


def test_means() -> None:
    lengths = torch.tensor([4, 1, 5])
    weight, denominator = AGGREGATIONS["token-mean"](lengths, [4, 1, 5], None, 9)
    assert (weight.tolist(), denominator) == ([1.0, 1.0, 1.0], 10)
    weight, denominator = AGGREGATIONS["seq-mean-token-mean"](lengths, [4, 1, 5], None, 9)
    torch.testing.assert_close(weight, torch.tensor([0.25, 1.0, 0.2]))
    assert denominator == 3
