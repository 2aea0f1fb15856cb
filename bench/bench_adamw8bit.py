"""A step of AdamW on bfloat16 weights with 8-bit moments: torchao, bitsandbytes (float32 weights), float32
moments by torch, and ours. The floor is one read of gradient, weight and moments, and one write of weight and
moments."""

from __future__ import annotations

import pytest
import torch

from bench.roofline import DEVICE, timed
from locus_fast.step.optim import clip_and_step
from locus_fast.step.optimizers import make_optimizer

SHAPES = [(3584, 3584), (18_944, 3584), (3584,)] if DEVICE == "cuda" else [(256, 512), (512,)]
BYTES = {"ours": 2 + 2 + 2 + 2 * 2.05, "torchao": 2 + 2 + 2 + 2 * 2.03, "torch, float32": 4 * (2 + 1 + 4)}


def weights(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=rng).mul(0.02).to(DEVICE, dtype) for shape in SHAPES]
    return [torch.nn.Parameter(weight) for weight in made]


@pytest.mark.parametrize("way", BYTES)
def test_adamw8bit(benchmark, way: str) -> None:
    parameters = weights(torch.float32 if way == "torch, float32" else torch.bfloat16)
    if way == "torchao":
        peer = pytest.importorskip("torchao.optim").AdamW8bit(parameters, lr=1e-6, bf16_stochastic_round=True)
    else:
        groups = [{"params": parameters, "rate": 1e-6}]
        optimizer = make_optimizer("adamw8bit" if way == "ours" else "adamw", groups, 0.0)
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(3)]

    def step(n: int) -> None:
        for p, gradient in zip(parameters, gradients[n], strict=True):
            p.grad = gradient
        if way == "torchao":
            stance = "force_eager" if DEVICE == "cpu" else "default"
            with torch.compiler.set_stance(stance):
                peer.step()
        else:
            clip_and_step(optimizer, denominator=1.0, factor=1.0, clip=1e9, seed=n)

    before = [p.detach().clone() for p in parameters]
    step(0)
    moved = torch.cat([(p.detach() - b).flatten().double() for p, b in zip(parameters, before, strict=True)])
    sign = torch.cat([gradient.flatten().sign().double() for gradient in gradients[0]])
    # a first step is one rate against the sign
    assert (-moved * sign).mean().item() == pytest.approx(1e-6, rel=0.2)
    count = sum(p.numel() for p in parameters)
    benchmark.group = f"AdamW step, {count:,} parameters"
    timed(
        benchmark,
        step,
        [(0,), (1,), (2,)],
        moved=int(BYTES[way] * count),
        rounds=30 if DEVICE == "cuda" else 5,
    )
