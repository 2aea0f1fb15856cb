"""What sharing the prefill buys: forward and backward of G replies over one prompt, against the naive loop that repeats the prompt for each."""

from __future__ import annotations

import pytest
import torch

from locus_fast.packing import PromptBatch, Replies
from locus_fast.policy import prefill, reply_logprob
from locus_fast.types import Rollout
from tests.small_models import naive_logprob, small_model, small_prompt

GROUP, LENGTH = 8, 16


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def task(request):
    model = small_model(request.param)
    prompts = [small_prompt(model, [(16, 20), (4, 6)], words=12, seed=seed) for seed in range(2)]
    ids = torch.randint(3, 290, (2 * GROUP, LENGTH), generator=torch.Generator().manual_seed(0))
    return model, prompts, ids


def one_prefill(model, prompts, ids) -> torch.Tensor:
    rollout = Rollout(ids, torch.full((len(ids),), LENGTH), torch.zeros(ids.shape))
    prefix = prefill(model, PromptBatch.of(prompts, model.config, "cpu"))
    return reply_logprob(model, prefix, Replies.of(prefix.batch, rollout, [LENGTH] * len(ids), range(2)), temperature=1.0)[0]


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

    benchmark.group = f"policy forward + backward, 2 prompts x {GROUP} replies x {LENGTH} tokens, {model.config.model_type}"
    benchmark.extra_info["unique_tokens"] = sum(len(p.ids) for p in prompts) + ids.numel()
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
