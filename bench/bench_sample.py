"""Sampling a token from logits: eager PyTorch, torch.compile and ours. The floor is one read of the
logits."""

from __future__ import annotations

import pytest
import torch
from locus_kernels.sample import reference, sample
from locus_kernels.sample.reference import Distribution, Place

from bench.roofline import DEVICE, timed

ROWS, VOCAB = (256, 151_936) if DEVICE == "cuda" else (8, 4_001)
SETTINGS = {
    "temperature": {"top_p": 1.0, "top_k": 0},
    "top-p": {"top_p": 0.9, "top_k": 0},
    "top-k": {"top_p": 1.0, "top_k": 50},
}


def eager(logits, row, position, choices):
    """Softmax, cut by sorting, multinomial's usual stand-in: the exponential race."""
    scores = logits.float()
    logprob = scores.log_softmax(-1)
    kept = reference.keep(scores, choices["top_k"], choices["top_p"])
    probability = logprob.exp() * kept
    ids = (probability / torch.empty_like(probability).exponential_()).argmax(-1)
    return ids, logprob.gather(-1, ids[:, None])[:, 0]


def ours(logits, row, position, choices):
    return sample(logits, seed=1, row=row, position=position, **choices)


compiled = torch.compile(eager, dynamic=False)
WAYS = {"eager": eager, "torch.compile": compiled, "ours": ours}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("way", WAYS)
def test_sample(benchmark, way: str, setting: str) -> None:
    row = torch.arange(ROWS, device=DEVICE)
    inputs = []
    for n in range(3):
        logits = (
            torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(n)).mul(3).to(torch.bfloat16)
        )
        inputs.append((logits.to(DEVICE), row, n, SETTINGS[setting]))
    for logits, _, n, choices in inputs:
        ids, logprob = WAYS[way](logits, row, n, choices)
        truth = logits.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        torch.testing.assert_close(logprob.double(), truth, atol=2e-5, rtol=0)
        assert (
            reference.keep(logits.float(), choices["top_k"], choices["top_p"]).gather(-1, ids[:, None]).all()
        )
        if way == "ours":
            distribution = Distribution(temperature=1.0, allowed=None, **choices)
            expected = reference.sample(logits, Place(1, row, n), distribution)[0]
            assert (ids == expected).float().mean() > 0.99
    benchmark.group = f"sample, {setting}, {ROWS} x {VOCAB} bfloat16"
    timed(benchmark, WAYS[way], inputs, moved=ROWS * VOCAB * 2, rounds=30 if DEVICE == "cuda" else 5)
