"""One decoding step over shared prompts: SDPA with the prompt repeated for each reply, torch.compile of eager
PyTorch, and ours.

The floor reads each prompt's keys and values once, and each row's own. The repeated keys are made outside the
timed call.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from locus_kernels.shared_prefix_decode import shared_prefix_decode

from bench.roofline import DEVICE, timed

# query heads, key heads, head dimension
SHAPES = {"3B": (16, 2, 128), "7B": (28, 4, 128)} if DEVICE == "cuda" else {"small": (4, 2, 64)}
PROMPTS, REPLIES, LENGTH, OWN, CAPACITY = (8, 8, 1000, 16, 32) if DEVICE == "cuda" else (2, 8, 1000, 16, 32)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def make(shape: str, seed: int) -> dict[str, torch.Tensor]:
    heads, key_heads, dimension = SHAPES[shape]
    generator, rows = torch.Generator().manual_seed(seed), PROMPTS * REPLIES

    def some(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(DEVICE, DTYPE)

    prompt = [some(key_heads, PROMPTS * LENGTH, dimension).transpose(0, 1) for _ in range(2)]
    own = [some(rows, key_heads, CAPACITY, dimension) for _ in range(2)]
    padded = [x.unflatten(0, (PROMPTS, LENGTH)).transpose(1, 2).contiguous() for x in prompt]
    repeated = [
        torch.cat([p.repeat_interleave(REPLIES, 0), o[:, :, :OWN]], 2)
        for p, o in zip(padded, own, strict=True)
    ]
    groups = torch.arange(PROMPTS + 1, dtype=torch.int32, device=DEVICE)
    lengths, real = (
        torch.full((rows,), OWN, dtype=torch.int32, device=DEVICE),
        torch.ones(PROMPTS, LENGTH, dtype=torch.bool, device=DEVICE),
    )
    tensors = {
        "cu_prompts": groups * LENGTH,
        "cu_rows": groups * REPLIES,
        "own_lengths": lengths,
        "real": real,
    }
    pairs = {"prompt": prompt, "own": own, "padded": padded, "repeated": repeated}
    return (
        tensors
        | {f"{name}_{kind}": x for name, pair in pairs.items() for kind, x in zip("kv", pair, strict=True)}
        | {"q": some(rows, heads, dimension)}
    )


def sdpa(c):
    q, scale = c["q"][:, :, None], c["q"].shape[-1] ** -0.5
    return F.scaled_dot_product_attention(q, c["repeated_k"], c["repeated_v"], scale=scale, enable_gqa=True)[
        :, :, 0
    ]


def eager(c):
    """Padded prompts and einsum, the rows of a group against one copy of its keys."""
    q = (
        (c["q"] * c["q"].shape[-1] ** -0.5)
        .unflatten(0, (PROMPTS, REPLIES))
        .unflatten(2, (c["own_k"].shape[1], -1))
    )
    own_k, own_v = (c[name][:, :, :OWN].unflatten(0, (PROMPTS, REPLIES)) for name in ("own_k", "own_v"))
    to_prompt = torch.einsum("bgkhd,bkpd->bgkhp", q, c["padded_k"]).masked_fill(
        ~c["real"][:, None, None, None], -torch.inf
    )
    weight = torch.cat([to_prompt, torch.einsum("bgkhd,bgktd->bgkht", q, own_k)], -1).softmax(-1)
    out = torch.einsum("bgkhp,bkpd->bgkhd", weight[..., :LENGTH], c["padded_v"])
    return (out + torch.einsum("bgkht,bgktd->bgkhd", weight[..., LENGTH:], own_v)).flatten(0, 1).flatten(1, 2)


def ours(c):
    bounds = {"longest_prompt": LENGTH, "most_rows": REPLIES, "longest_own": CAPACITY}
    tensors = (
        c[name]
        for name in ("q", "prompt_k", "prompt_v", "cu_prompts", "own_k", "own_v", "own_lengths", "cu_rows")
    )
    return shared_prefix_decode(*tensors, scale=c["q"].shape[-1] ** -0.5, **bounds)


WAYS = {
    "SDPA, repeated keys": sdpa,
    "eager": eager,
    "torch.compile": torch.compile(eager, dynamic=False),
    "ours": ours,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_shared_prefix_decode(benchmark, way: str, shape: str) -> None:
    cases = [make(shape, seed) for seed in range(3)]
    for case in cases:
        truth = sdpa({name: x.double() if x.is_floating_point() else x for name, x in case.items()})
        bound = 2 * (eager(case).double() - truth).abs().max() + 1e-6
        assert (WAYS[way](case).double() - truth).abs().max() <= bound
    once = sum(cases[0][name].nbytes for name in ("prompt_k", "prompt_v"))
    own = sum(cases[0][name][:, :, :OWN].nbytes for name in ("own_k", "own_v"))
    benchmark.group = (
        f"shared_prefix_decode, {shape}, {PROMPTS} x {REPLIES} replies, prompts of {LENGTH}, {DTYPE}"
    )
    timed(
        benchmark,
        WAYS[way],
        [(case,) for case in cases],
        moved=once + own + 2 * cases[0]["q"].nbytes,
        rounds=50,
    )
