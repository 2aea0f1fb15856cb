"""From hidden states to loss, metrics and gradients: by the fused operator where a loss has one, by log-probs
and pure functions otherwise, both against a loop over the tokens in float64.

Legend: T tokens of 5 replies, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from locus_fast.step.losses import KL_ESTIMATORS, LOSSES, Objective

LENGTHS, D, V, TEMPERATURE = [9, 1, 14, 6, 7], 24, 131, 0.8
SETTINGS: dict[str, Any] = {
    "clip_low": 0.2,
    "clip_high": 0.28,
    "delta": math.inf,
    "kl_coef": 0.3,
    "entropy_coef": 0.0,
}
SETTINGS |= {"loss": "grpo", "kl_estimator": "k3", "log_ratio_clamp": math.inf, "kl_clamp": math.inf}
ACTING = {"log_ratio_clamp": 0.9, "kl_clamp": 0.5}
# float64 loss [], logprob [T], hidden [T, D], head [V, D]; metrics
Result = tuple[dict[str, Tensor], dict[str, float]]


def double(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def objective(**settings: Any) -> Objective:
    return Objective(**{**SETTINGS, **settings})


def case(dtype: torch.dtype, old: bool = True, reference: bool = True) -> tuple[list[Tensor], dict[str, Any]]:
    """([hidden, head, ids], the rest of a loss's inputs): ratios on both sides of every bound, an advantage
    of 0, and a reply of weight 0."""
    generator = torch.Generator().manual_seed(11)
    T = sum(LENGTHS)
    hidden, head = (torch.randn(n, D, generator=generator).to(dtype) for n in (T, V))
    head = head / 4  # exact in every type
    ids = torch.randint(V, (T,), generator=generator)
    logits = hidden.double() @ head.double().T / TEMPERATURE
    logprob = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    row = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    noise = [torch.randn(T, generator=generator).double() for _ in range(2)]
    shift = double([0.05, -0.5, 0.4, -0.02, -0.35])[row]  # so that whole replies are past a bound
    values = torch.float64 if dtype == torch.float64 else torch.float32
    return [hidden, head, ids], {
        "old": (logprob + shift + 0.4 * noise[0]).to(values) if old else None,
        "reference": (logprob + 0.7 * noise[1]).to(values) if reference else None,
        "advantage": torch.tensor([1.0, 0.7, -0.8, 0.0, -1.4], dtype=values)[row],
        "weight": torch.tensor([0.5, 1.0, 0.25, 2.0, 0.75], dtype=values)[row] * (row != 0),
        "row": row,
        "lengths": torch.tensor(LENGTHS),
    }


def result(chosen: Objective, tensors: list[Tensor], rest: dict[str, Any]) -> Result:
    """What `from_hidden` gives."""
    leaves = [t.clone().requires_grad_() for t in tensors[:2]]
    loss, logprob, metrics = chosen.from_hidden(*leaves, tensors[2], TEMPERATURE, rest)
    assert not logprob.requires_grad
    loss.backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    values = {"loss": loss.detach(), "logprob": logprob, "hidden": leaves[0].grad, "head": leaves[1].grad}
    return {name: value.double() for name, value in values.items()}, {k: float(v) for k, v in metrics.items()}


def token_terms(
    chosen: Objective, x: Tensor, d: Tensor, advantage: float, metrics: dict[str, float]
) -> Tensor:
    """The loss of one token with log-prob x, whose log-ratio to the policy that sampled is d."""
    low, high = 1 - chosen.clip_low, 1 + chosen.clip_high
    if past := abs(d.item()) > chosen.log_ratio_clamp:
        d = double(math.copysign(chosen.log_ratio_clamp, d.item()))
    ratio = d.exp()
    metrics["ratio_clamped"] += past
    metrics["ratio_max"] = max(metrics["ratio_max"], ratio.item())
    if chosen.loss == "cispo":
        metrics["clip_high"] += ratio.item() > high
        return -min(ratio.item(), high) * advantage * x
    if advantage >= 0:
        held = ratio.item() > high
        metrics["clip_high"] += held and advantage > 0
        return -advantage * (double(high) if held else ratio)
    if ratio.item() < low:
        metrics["clip_low"] += 1
        return double(-advantage * low)
    if ratio.item() > chosen.delta:
        metrics["clip_high"] += 1
        return double(-advantage * chosen.delta)
    return -advantage * ratio


def kl_term(chosen: Objective, log_ratio: Tensor, metrics: dict[str, float]) -> Tensor:
    """The KL of one token, given log(reference / policy)."""
    bound, most = chosen.log_ratio_clamp, chosen.kl_clamp
    if past := abs(log_ratio.item()) > bound:
        log_ratio = double(math.copysign(bound, log_ratio.item()))
    formulas = {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": log_ratio.exp() - 1 - log_ratio}
    kl = formulas[chosen.kl_estimator]
    if abs(kl.item()) > most:
        past, kl = True, double(math.copysign(most, kl.item()))
    metrics["kl_clamped"] += past
    metrics["kl"] += kl.item()
    return kl


def truth(chosen: Objective, tensors: list[Tensor], rest: dict[str, Any]) -> Result:
    """The same by a loop over replies and tokens, float64. GSPO's ratio is differentiated as it stands: the
    slope that each of n tokens has then in n token losses is what each has in its own, in the stop-gradient
    form."""
    hidden, head = (t.double().requires_grad_() for t in tensors[:2])
    logprobs = (hidden @ head.T / TEMPERATURE).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    x = torch.stack([logprobs[t, word] for t, word in enumerate(tensors[2].tolist())])
    old = x.detach() if rest["old"] is None else rest["old"].double()
    metrics = dict.fromkeys(("clip_low", "clip_high", "ratio_clamped", "kl_clamped", "kl", "ratio_max"), 0.0)
    loss, first = torch.zeros((), dtype=torch.float64), 0
    for length in LENGTHS:
        places = range(first, first + length)
        first += length
        mean = torch.stack([x[t] - old[t] for t in places]).sum() / length
        for t in places:
            d = mean if chosen.loss == "gspo" else x[t] - old[t]
            token = token_terms(chosen, x[t], d, rest["advantage"][t].item(), metrics)
            if rest["reference"] is not None:
                token = token + chosen.kl_coef * kl_term(chosen, rest["reference"][t] - x[t], metrics)
            loss = loss + rest["weight"][t].item() * (token - chosen.entropy_coef * entropy[t])
    loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    values = {"loss": loss.detach(), "logprob": x.detach(), "hidden": hidden.grad, "head": head.grad}
    return values, metrics | {"entropy": entropy.sum().item()}


def error(got: Tensor, true: Tensor) -> float:
    """Of the largest element, relative to the largest there is."""
    assert got.shape == true.shape
    return float((got - true).abs().max() / true.abs().max())


def assert_acting(metrics: dict[str, float], *names: str) -> None:
    """Some tokens are past each of these bounds, and not all of them."""
    for name in names:
        assert 0 < metrics[name] < sum(LENGTHS), name


def test_what_is_fused() -> None:
    """The losses of the clipped surrogate with k3, unless they have a two-sided clip or an entropy bonus."""
    for loss, estimator, delta, coefficient in itertools.product(
        LOSSES, KL_ESTIMATORS, (math.inf, 2.0), (0.0, 0.1)
    ):
        chosen = objective(loss=loss, kl_estimator=estimator, delta=delta, entropy_coef=coefficient)
        fused = loss in ("grpo", "dr_grpo", "bnpo", "dapo") and estimator == "k3"
        assert chosen.is_fused == (fused and delta == math.inf and coefficient == 0)


@pytest.mark.parametrize("clamps", [{}, ACTING], ids=["no clamps", "clamps"])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no reference"])
@pytest.mark.parametrize("old", [True, False], ids=["old", "on-policy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_is_plain(dtype: torch.dtype, old: bool, reference: bool, clamps: dict, monkeypatch) -> None:
    """The fused operator's error is at most 1.5 times that of log-probs and the pure function, or 1e-5 of the
    largest value; its counts are the loop's."""
    tensors, rest = case(dtype, old, reference)
    chosen = objective(**clamps)
    assert chosen.is_fused
    fused, counted = result(chosen, tensors, rest)
    monkeypatch.setattr(Objective, "is_fused", False)
    plain, plainly = result(chosen, tensors, rest)
    true, expected = truth(chosen, tensors, rest)
    for name, value in true.items():
        assert error(fused[name], value) <= max(1e-5, 1.5 * error(plain[name], value)), name
    for metrics in (counted, plainly):
        assert metrics == pytest.approx(expected, rel=1e-5)
    if old:
        assert_acting(expected, "clip_low", "clip_high")
    if clamps and old and reference:
        assert_acting(expected, "ratio_clamped", "kl_clamped")


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "bnpo", "dapo"])
def test_every_fused_loss_is_the_loop(loss: str) -> None:
    tensors, rest = case(torch.float64)
    chosen = objective(loss=loss, **ACTING)
    assert chosen.is_fused
    got, metrics = result(chosen, tensors, rest)
    true, expected = truth(chosen, tensors, rest)
    for name, value in true.items():
        assert error(got[name], value) <= 1e-12, name
    assert metrics == pytest.approx(expected, rel=1e-12)


PLAIN: list[dict[str, Any]] = [  # settings that no operator fuses
    {"loss": "gspo"},
    {"loss": "gspo", "clip_low": 0.05, "clip_high": 0.05, "delta": 1.6, "log_ratio_clamp": 0.6},
    {"loss": "gspo", "kl_estimator": "k2", "entropy_coef": 0.1, **ACTING},
    {"loss": "cispo"},
    {"loss": "cispo", "kl_estimator": "k1", "entropy_coef": 0.1, **ACTING},
    {"loss": "grpo", "kl_estimator": "k1"},
    {"loss": "grpo", "kl_estimator": "k1", **ACTING},
    {"loss": "grpo", "kl_estimator": "k2"},
    {"loss": "grpo", "kl_estimator": "k2", **ACTING},
    {"loss": "grpo", "delta": 1.5},
    {"loss": "dr_grpo", "delta": 1.3},
    {"loss": "bnpo", "entropy_coef": 0.2},
    {"loss": "dapo", "delta": 1.5, "entropy_coef": 0.2, "kl_estimator": "k1", **ACTING},
]
# The largest error of (loss and log-prob, gradients), relative: those of bfloat16 are rounded to 8 bits at
# the end.
BOUNDS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 2.0**-8)}


@pytest.mark.parametrize("old", [True, False], ids=["old", "on-policy"])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no reference"])
@pytest.mark.parametrize("settings", PLAIN, ids=str)
def test_plain_is_the_loop(settings: dict[str, Any], reference: bool, old: bool) -> None:
    chosen = objective(**settings)
    assert not chosen.is_fused
    for dtype, bounds in BOUNDS.items():
        tensors, rest = case(dtype, old, reference)
        got, metrics = result(chosen, tensors, rest)
        true, expected = truth(chosen, tensors, rest)
        for name, value in true.items():
            assert error(got[name], value) <= bounds[name in ("hidden", "head")], (dtype, name)
        assert metrics == pytest.approx(expected, rel=1e-5), dtype
    if old:
        assert_acting(expected, "clip_high", *(("clip_low",) if chosen.loss != "cispo" else ()))
    if reference and chosen.kl_clamp < 1:
        assert_acting(expected, "kl_clamped")


@pytest.mark.parametrize("settings", [{}, *PLAIN], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_microbatch_without_tokens(settings: dict[str, Any], dtype: torch.dtype) -> None:
    (hidden, head, ids), rest = case(dtype)
    rest = {name: value if name == "lengths" else value[:0] for name, value in rest.items()}
    got, metrics = result(objective(**settings), [hidden[:0], head, ids[:0]], rest)
    assert got["loss"].item() == 0
    assert got["logprob"].shape == (0,)
    assert got["hidden"].shape == (0, D)
    assert torch.equal(got["head"], torch.zeros(V, D, dtype=torch.float64))
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("settings", [{}, *PLAIN], ids=str)
def test_weights_of_0_leave_no_gradient(settings: dict[str, Any]) -> None:
    """The metrics are those of all tokens, whatever their weight."""
    tensors, rest = case(torch.float32)
    chosen = objective(**settings)
    got, metrics = result(chosen, tensors, {**rest, "weight": torch.zeros(sum(LENGTHS))})
    assert not any(got[name].any() for name in ("loss", "hidden", "head"))
    assert metrics == pytest.approx(truth(chosen, tensors, rest)[1], rel=1e-5)
