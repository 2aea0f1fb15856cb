"""A whole step. What sharing the prefill buys against the naive loop; our step on a model of real
proportions; and the race against TRL.

The race runs both sides' steps in turn, so that whatever else the machine does falls on both; the figure is
the ratio of the medians. Nothing is timed unless our log-probs are plain transformers' and our FLOPs are few
enough: near the floor, and a seventh of TRL's.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from typing import Any

import pytest
import torch

from bench.race_case import GROUP, PROMPTS, Case, count_flops, floor_flops
from bench.race_ours import Ours, check
from locus_fast.model.packing import PromptBatch, Replies
from locus_fast.model.policy import prefill, reply_logprob
from locus_fast.step.rollout import Rollout
from tests.small_models import naive_logprob, small_model, small_prompt

LENGTH = 16  # of a reply in the comparison with the naive loop
ROUNDS = 3
COURSES = [
    (family, sizes, kl)
    for family, sizes in (("qwen2_5_vl", "896x896"), ("qwen2_5_vl", "mixed sizes"), ("qwen3_vl", "896x896"))
    for kl in (False, True)
]
HAS_TRL = importlib.util.find_spec("trl") is not None


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def task(request):
    model = small_model(request.param)
    prompts = [small_prompt(model, [(16, 20), (4, 6)], words=12, seed=seed) for seed in range(2)]
    ids = torch.randint(3, 290, (2 * GROUP, LENGTH), generator=torch.Generator().manual_seed(0))
    return model, prompts, ids


def one_prefill(model, prompts, ids) -> torch.Tensor:
    rollout = Rollout(
        ids, torch.full((len(ids),), LENGTH), torch.zeros(ids.shape), torch.zeros(len(ids), dtype=torch.bool)
    )
    prefix = prefill(model, PromptBatch.of(prompts, model.config, "cpu"))
    return reply_logprob(
        model,
        prefix,
        Replies.of(prefix.batch, rollout.ids, [[LENGTH] * GROUP] * 2, range(2)),
        temperature=1.0,
    )[0]


def naive(model, prompts, ids) -> torch.Tensor:
    return torch.cat(naive_logprob(model, prompts, [list(ids[:GROUP]), list(ids[GROUP:])]))


@pytest.mark.parametrize("way", [naive, one_prefill])
def test_forward_and_backward(benchmark, task, way) -> None:
    model, prompts, ids = task
    with torch.no_grad():
        torch.testing.assert_close(way(model, prompts, ids), naive(model, prompts, ids), rtol=0, atol=1e-5)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        way(model, prompts, ids).sum().backward()

    benchmark.group = (
        f"policy forward + backward, 2 prompts x {GROUP} replies x {LENGTH} tokens, {model.config.model_type}"
    )
    benchmark.extra_info["unique_tokens"] = sum(len(p.ids) for p in prompts) + ids.numel()
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)


def checked(case: Case, kl: bool) -> tuple[Ours, dict[str, Any]]:
    """(our side after a first step that was found right, what was counted of it)."""
    ours, plain = Ours(case, kl), case.load()
    result: list = []
    flops = count_flops(lambda: result.extend(ours.step()))
    batch, rollout, logprob = result
    check(plain, batch, rollout, logprob)
    floor, decode = floor_flops(plain, batch.prompts, kl)
    ours.seconds.clear()
    over = {
        "over the floor": round(flops / (floor + decode), 4),
        "over the floor without decoding": round(flops / floor, 4),
    }
    return ours, {"FLOPs": flops, "prompt tokens": batch.lengths, **over}


def report(benchmark, ours: Ours, counted: dict[str, Any]) -> None:
    median = benchmark.stats.stats.median
    phases = {name: round(statistics.median(seconds) / median, 4) for name, seconds in ours.seconds.items()}
    rate = PROMPTS * GROUP / median
    benchmark.extra_info |= {
        "device": f"cpu, {torch.get_num_threads()} threads",
        "rollouts/s": rate,
        "share of the step": phases,
        **counted,
    }


@pytest.mark.parametrize(
    ("sizes", "kl"),
    [("896x896", True), ("mixed sizes", False)],
    ids=["896x896, KL on", "mixed sizes, KL off"],
)
def test_step(benchmark, tmp_path, sizes: str, kl: bool) -> None:
    ours, counted = checked(Case("qwen2_5_vl", sizes, tmp_path), kl)
    assert counted["over the floor"] <= counted["over the floor without decoding"] <= 1.10
    benchmark.group = "our step, qwen2_5_vl"
    benchmark.pedantic(ours.step, rounds=1)
    report(benchmark, ours, counted)


@pytest.mark.skipif(not HAS_TRL, reason="TRL is not installed: pip install -e '.[bench]'")
@pytest.mark.parametrize(
    ("family", "sizes", "kl"), COURSES, ids=[f"{f}, {s}, KL {'on' if kl else 'off'}" for f, s, kl in COURSES]
)
def test_race_against_trl(benchmark, tmp_path, family: str, sizes: str, kl: bool) -> None:
    from bench.race_trl import Peer

    case = Case(family, sizes, tmp_path / "model")
    ours, counted = checked(case, kl)
    peer = Peer(case, kl, tmp_path / "trl")
    fewer = count_flops(peer.step) / counted["FLOPs"]
    assert fewer >= 7
    peer_seconds: list[float] = []

    def peer_step() -> None:
        began = time.perf_counter()
        peer.step()
        peer_seconds.append(time.perf_counter() - began)

    benchmark.group = "our step between two of TRL's"
    benchmark.pedantic(ours.step, setup=peer_step, rounds=ROUNDS)
    report(benchmark, ours, counted)
    ratio = statistics.median(peer_seconds) / benchmark.stats.stats.median
    assert ratio >= 5
    benchmark.extra_info |= {
        "rollouts/s over TRL's": round(ratio, 2),
        "TRL's FLOPs over ours": round(fewer, 2),
    }
    print(f"\n{family}, {sizes}, KL {kl}: {ratio:.2f} times TRL's rollouts/s, {fewer:.2f} times fewer FLOPs")
