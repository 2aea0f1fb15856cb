"""The engine on CUDA: the same log-probs and gradients as on the CPU, graphs that change nothing, bfloat16
that trains."""

from __future__ import annotations

import pytest
import torch

from locus_fast.model.attention import backend_of, use_attention
from locus_fast.model.packing import PromptBatch, Replies
from locus_fast.model.policy import checkpoint_activations, prefill, reply_logprob
from locus_fast.step import rollout
from locus_fast.step.rollout import Decoder, Sampling
from locus_fast.step.vocabulary import Vocabulary
from tests.small_models import IMAGE, VOCABULARY, small_model, small_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SAMPLING = Sampling(group_size=7, max_new_tokens=12, temperature=0.8, top_p=1.0)


def task(family: str, device: str, dtype: torch.dtype):
    model = small_model(family).to(device, dtype)
    use_attention(model)
    prompts = [
        small_prompt(model, grids, words=5, seed=seed)
        for seed, grids in enumerate([[(8, 12), (4, 4)], [], [(4, 8)]])
    ]
    words = Vocabulary((torch.arange(VOCABULARY) < IMAGE).to(device), torch.arange(2, 40, device=device))
    return model, PromptBatch.of(prompts, model.config, device), words


def trained(model, batch, played) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    replies = Replies.of(batch, played.ids, played.lengths.view(3, 7).tolist(), range(3))
    logprob, _ = reply_logprob(model, prefill(model, batch), replies, SAMPLING.temperature)
    logprob.sum().backward()
    return logprob.detach().cpu(), {
        name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_float32_equals_the_cpu(family: str) -> None:
    model, batch, words = task(family, "cpu", torch.float32)
    played = Decoder(model, words).generate(prefill(model, batch), SAMPLING, seed=4, groups=[3, 0, 9])
    expected, expected_gradient = trained(model, batch, played)
    model, batch, words = task(family, "cuda", torch.float32)
    parts = (played.ids, played.lengths, played.logprob, played.truncated)
    on_gpu = rollout.Rollout(*(part.cuda() for part in parts))
    logprob, gradient = trained(model, batch, on_gpu)
    torch.testing.assert_close(logprob, expected, rtol=0, atol=1e-4)
    for name, value in gradient.items():
        assert (value - expected_gradient[name]).norm() <= 1e-3 * expected_gradient[name].norm().clamp(
            min=1e-6
        ), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_graphs_change_nothing_and_are_used_again(
    family: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    model, batch, words = task(family, "cuda", dtype)
    if checkpointing:
        checkpoint_activations(model)
    with torch.no_grad():
        prefix = prefill(model, batch)
        eager = Decoder(model, words, static=False).generate(prefix, SAMPLING, seed=4, groups=[3, 0, 9])
        decoder = Decoder(model, words)
        runs = [decoder.generate(prefix, SAMPLING, seed=4, groups=[3, 0, 9]) for _ in range(3)]
    assert any(graph.graph is not None for graph in decoder.graphs.values())
    assert torch.equal(runs[1].ids, runs[2].ids)
    assert (runs[2].ids == eager.ids).float().mean() > (0.99 if dtype == torch.float32 else 0.8)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_bfloat16_sampler_and_training_forward(family: str) -> None:
    model, batch, words = task(family, "cuda", torch.bfloat16)
    assert backend_of(model).name != "plain"
    played = Decoder(model, words).generate(prefill(model, batch), SAMPLING, seed=4, groups=[3, 0, 9])
    logprob, gradient = trained(model, batch, played)
    sampled = torch.cat([played.logprob[r, :n] for r, n in enumerate(played.lengths.tolist())]).cpu()
    assert (logprob - sampled).abs().mean() < 0.05
    assert all(value.isfinite().all() for value in gradient.values())


def test_nothing_waits_but_the_count_of_running_replies() -> None:
    model, batch, words = task("qwen3_vl", "cuda", torch.bfloat16)
    decoder = Decoder(model, words)
    decoder.generate(prefill(model, batch), SAMPLING, seed=4, groups=[3, 0, 9])  # compiles and captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = PromptBatch.of(batch.prompts, model.config, "cuda")
        played = decoder.generate(prefill(model, again), SAMPLING, seed=4, groups=[3, 0, 9])
        replies = Replies.of(again, played.ids, [[3] * 7] * 3, range(3))
        reply_logprob(model, prefill(model, again), replies, 1.0)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
