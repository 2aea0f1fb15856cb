"""G replies over one prompt, forward and backward: keys repeated for every reply, the same compiled, and ours
on each backend that runs here.

The floor is the matrix products over unique keys: replies to their prompt, and each to itself.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from locus_kernels.shared_prefix_attention import (
    Packed,
    SharedPrefixLayout,
    choose_backend,
    reference,
    shared_prefix_attention,
)

from bench.roofline import DEVICE, synchronize

GROUPS, P, G, L, H, K, D = (8, 1000, 8, 64, 28, 4, 128) if DEVICE == "cuda" else (2, 300, 8, 16, 8, 4, 32)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SCALE = D**-0.5
LAYOUT = SharedPrefixLayout.of(Packed.of([P] * GROUPS, DEVICE), [[L] * G] * GROUPS)
BACKENDS = (
    ["torch", "flash_attn_2", "flash_attn_3", "flash_attn_4"] if DEVICE == "cuda" else ["torch", "plain"]
)


def repeated(q, k, v, prompt_k, prompt_v):
    """Every reply with its own copy of the prompt's keys, as a batch of rows."""
    mask = torch.cat([torch.ones(L, P, dtype=torch.bool), torch.ones(L, L, dtype=torch.bool).tril()], 1).to(
        q.device
    )
    rows = [t.view(GROUPS * G, L, -1, D).transpose(1, 2) for t in (q, k, v)]
    shared = [t.view(GROUPS, P, K, D).repeat_interleave(G, 0).transpose(1, 2) for t in (prompt_k, prompt_v)]
    keys, values = (torch.cat([prompt, own], 2) for prompt, own in zip(shared, rows[1:], strict=True))
    out = F.scaled_dot_product_attention(rows[0], keys, values, attn_mask=mask, scale=SCALE, enable_gqa=True)
    return out.transpose(1, 2).reshape(len(q), -1, D)


def ours(name: str):
    backend = choose_backend(name, DEVICE, DTYPE, (D,))
    return lambda *tensors: shared_prefix_attention(*tensors, LAYOUT, scale=SCALE, backend=backend)


def inputs(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = [(GROUPS * G * L, H), (GROUPS * G * L, K), (GROUPS * G * L, K), (GROUPS * P, K), (GROUPS * P, K)]
    return [torch.randn(n, h, D, generator=rng).to(DEVICE, dtype).requires_grad_() for n, h in shapes]


def both(way, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    out = way(*tensors)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


@pytest.mark.parametrize(
    "name", ["keys repeated", "keys repeated, torch.compile", *(f"ours, {name}" for name in BACKENDS)]
)
def test_shared_prefix_attention(benchmark, name: str) -> None:
    if name.startswith("ours"):
        try:
            way = ours(name.removeprefix("ours, "))
        except ValueError as error:
            pytest.skip(str(error))
    else:
        way = torch.compile(repeated, dynamic=False) if "compile" in name else repeated
    given = inputs(0, DTYPE)
    truth = both(
        lambda *t: reference.shared_prefix_attention(*t, LAYOUT, SCALE),
        [t.detach().double().requires_grad_() for t in given],
    )
    eager = both(repeated, given)
    for value, plain, exact in zip(both(way, given), eager, truth, strict=True):
        assert (value - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5
    turn = [inputs(seed, DTYPE) for seed in range(4)]

    def call() -> None:
        both(way, turn[0])
        turn.append(turn.pop(0))
        synchronize()

    dtype = str(DTYPE).removeprefix("torch.")
    sizes = f"{GROUPS} x {G} replies x {L} tokens over {P}"
    benchmark.group = f"shared-prefix attention, {sizes}, forward + backward, {dtype}"
    benchmark.pedantic(call, rounds=20 if DEVICE == "cuda" else 5, warmup_rounds=2)
    flops = 14 * GROUPS * G * H * D * (L * P + L * (L + 1) / 2)  # two products forward, five backward
    benchmark.extra_info |= {
        "device": DEVICE,
        "TFLOP/s over unique keys": round(flops / benchmark.stats.stats.median / 1e12, 4),
    }
