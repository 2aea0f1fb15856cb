"""Inputs of shared_prefix_decode, its truth row by row in float64, and eager PyTorch in the input dtype: the
yardstick of rounding errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from locus_kernels.shared_prefix_decode.reference import Bounds, Inputs
from torch import Tensor

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """Tensors as in `shared_prefix_decode`, and its host bounds."""

    q: Tensor
    prompt_k: Tensor
    prompt_v: Tensor
    cu_prompts: Tensor
    own_k: Tensor
    own_v: Tensor
    own_lengths: Tensor
    cu_rows: Tensor
    scale: float
    longest_prompt: int
    most_rows: int
    longest_own: int

    def tensors(self) -> Inputs:
        return Inputs._make(getattr(self, name) for name in Inputs._fields)

    def bounds(self) -> Bounds:
        return Bounds._make(getattr(self, name) for name in Bounds._fields)

    def options(self) -> dict:
        return {"scale": self.scale, **self.bounds()._asdict()}


def offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def make(
    prompts: list[int],
    rows: list[int],
    own: list[int],
    heads: int,
    key_heads: int,
    dimension: int,
    dtype: torch.dtype = torch.float32,
    *,
    padding: int = 0,
    capacity: int | None = None,
    storage: str = "KND",
    slack: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """Prompts of these lengths, rows[b] replies to each, own[r] tokens of each row; `padding` rows of no
    group. Every slot that must not be used is NaN. storage: which of tokens and key heads the prompts'
    tensors vary slowest in; `slack`: by how much the host bounds exceed the largest."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    R, N, most = sum(rows) + padding, sum(prompts), max([*own, 0])
    L = capacity or most + slack
    own = [*own, *[most] * padding]
    wide = torch.full((R, heads + 1, dimension + 8), NAN, dtype=dtype)
    wide[:, :heads, :dimension] = 2 * some(R, heads, dimension)
    prompt_k, prompt_v = (
        (
            some(key_heads, N, dimension).transpose(0, 1)
            if storage == "KND"
            else some(N, key_heads, dimension)
        ).to(device)
        for _ in range(2)
    )
    unused = torch.arange(L) >= torch.tensor(own, dtype=torch.int64).view(-1, 1)
    own_k, own_v = (
        some(R, key_heads, L, dimension).masked_fill(unused[:, None, :, None], NAN).to(device)
        for _ in range(2)
    )
    lengths = torch.tensor(own, dtype=torch.int32, device=device)
    bounds = (max([*prompts, 0]) + slack, max([*rows, 0]) + slack, most)
    query = wide.to(device)[:, :heads, :dimension]
    return Case(
        query,
        prompt_k,
        prompt_v,
        offsets(prompts).to(device),
        own_k,
        own_v,
        lengths,
        offsets(rows).to(device),
        dimension**-0.5,
        *bounds,
    )


def truth(case: Case) -> Tensor:
    """float64, one row and one head at a time, on CPU."""
    q, prompt_k, prompt_v, own_k, own_v = (
        x.cpu().double() for x in (case.q, case.prompt_k, case.prompt_v, case.own_k, case.own_v)
    )
    prompts, rows, lengths = case.cu_prompts.tolist(), case.cu_rows.tolist(), case.own_lengths.tolist()
    out = torch.zeros(q.shape, dtype=torch.float64)
    share = q.shape[1] // prompt_k.shape[1]
    for b in range(len(rows) - 1):
        for r in range(rows[b], rows[b + 1]):
            for h in range(q.shape[1]):
                tokens, own = slice(prompts[b], prompts[b + 1]), slice(lengths[r])
                keys = torch.cat([prompt_k[tokens, h // share], own_k[r, h // share, own]])
                values = torch.cat([prompt_v[tokens, h // share], own_v[r, h // share, own]])
                out[r, h] = (keys @ q[r, h] * case.scale).softmax(0) @ values
    return out


def eager(case: Case) -> Tensor:
    """Softmax attention in the input dtype, one row at a time."""
    out = torch.zeros(case.q.shape, dtype=case.q.dtype, device=case.q.device)
    prompts, rows, lengths = case.cu_prompts.tolist(), case.cu_rows.tolist(), case.own_lengths.tolist()
    for b in range(len(rows) - 1):
        for r in range(rows[b], rows[b + 1]):
            pairs = ((case.prompt_k, case.own_k), (case.prompt_v, case.own_v))
            k, v = (
                torch.cat([prompt[prompts[b] : prompts[b + 1]].transpose(0, 1), own[r, :, : lengths[r]]], 1)
                for prompt, own in pairs
            )
            if k.shape[1]:
                scores = torch.einsum("ksd,knd->ksn", case.q[r].unflatten(0, (len(k), -1)), k) * case.scale
                out[r] = torch.einsum("ksn,knd->ksd", scores.softmax(-1), v).flatten(0, 1)
    return out


def check(case: Case, out: Tensor) -> None:
    """`out` is no further from the truth than twice eager PyTorch; rows of no group are 0."""
    true, got = truth(case), out.cpu().double()
    assert got.shape == case.q.shape
    assert out.is_contiguous()
    bound = 2 * (eager(case).cpu().double() - true).abs().max() + 1e-6 if got.numel() else 0.0
    assert ((got - true).abs() <= bound).all(), ((got - true).abs().max(), bound)
    assert (got[int(case.cu_rows[-1]) :] == 0).all()
