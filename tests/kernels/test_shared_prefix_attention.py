"""The plain attentions against one written out token by token, in float64, values and gradients, ragged cases included."""

from __future__ import annotations

import pytest
import torch
from locus_kernels.shared_prefix_attention import (
    Ragged,
    SharedPrefixLayout,
    bidirectional_attention,
    causal_attention,
    decode_attention,
    shared_prefix_attention,
)
from torch import Tensor

H, K, D, SCALE = 4, 2, 8, 0.3


def rows(count: int, heads: int, seed: int) -> Tensor:
    return torch.randn(1, heads, count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query over all keys. q [H, D], k and v [K, n, D]."""
    k, v = (t.repeat_interleave(H // K, 0) for t in (k, v))
    weight = (torch.einsum("hd,hnd->hn", q, k) * SCALE).softmax(-1)
    return torch.einsum("hn,hnd->hd", weight, v)


def same(ours: Tensor, truth: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
    direction = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for a, b in zip(torch.autograd.grad((ours * direction).sum(), inputs), torch.autograd.grad((truth * direction).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 7], [2] * 64])
def test_causal(lengths: list[int]) -> None:
    n = sum(lengths)
    q, k, v = rows(n, H, 0), rows(n, K, 1), rows(n, K, 2)
    truth, start = [], 0
    for length in lengths:
        truth += [attend(q[0, :, start + i], k[0, :, start : start + i + 1], v[0, :, start : start + i + 1]) for i in range(length)]
        start += length
    same(causal_attention(q, k, v, Ragged.of(lengths), SCALE), torch.stack(truth, 1)[None], [q, k, v])


@pytest.mark.parametrize("lengths", [[1], [4, 4, 4], [3, 9, 3, 1]])
def test_bidirectional(lengths: list[int]) -> None:
    n = sum(lengths)
    q, k, v = rows(n, H, 0), rows(n, H, 1), rows(n, H, 2)
    ends = torch.tensor(lengths).cumsum(0)
    truth = []
    for length, end in zip(lengths, ends.tolist(), strict=True):
        keys, values = k[0, :, end - length : end], v[0, :, end - length : end]
        scores = torch.einsum("hqd,hnd->hqn", q[0, :, end - length : end], keys) * SCALE
        truth.append(torch.einsum("hqn,hnd->hqd", scores.softmax(-1), values))
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()])
    same(bidirectional_attention(q, k, v, cu_seqlens, SCALE), torch.cat(truth, 1)[None], [q, k, v])


@pytest.mark.parametrize(
    ("prompts", "groups", "lengths"),
    [
        ([5], [0], [[3, 1]]),
        ([5, 2, 7], [0, 1, 2], [[3, 1], [2, 2], [4, 5]]),
        ([5, 2, 7], [2, 0], [[3, 1, 6], [2]]),  # some groups only, and of different sizes
        ([4], [0], [[1]]),
        ([3, 3], [1], [[0, 2]]),  # a reply of one token feeds none
        ([2] * 64, range(64), [[1, 2]] * 64),
    ],
)
def test_shared_prefix(prompts: list[int], groups: list[int], lengths: list[list[int]]) -> None:
    n, t = sum(prompts), sum(map(sum, lengths))
    q, k, v, prompt_k, prompt_v = rows(t, H, 0), rows(t, K, 1), rows(t, K, 2), rows(n, K, 3), rows(n, K, 4)
    truth, start = [], 0
    for group, replies in zip(groups, lengths, strict=True):
        begin = sum(prompts[:group])
        of_prompt = slice(begin, begin + prompts[group])
        for length in replies:
            for i in range(length):
                own = slice(start, start + i + 1)
                keys, values = (torch.cat([p[0, :, of_prompt], o[0, :, own]], 1) for p, o in ((prompt_k, k), (prompt_v, v)))
                truth.append(attend(q[0, :, start + i], keys, values))
            start += length
    layout = SharedPrefixLayout.of(Ragged.of(prompts), list(groups), lengths)
    same(shared_prefix_attention(q, k, v, prompt_k, prompt_v, layout, SCALE), torch.stack(truth, 1)[None], [q, k, v, prompt_k, prompt_v])


@pytest.mark.parametrize(("prompts", "replies", "past"), [([5], 1, 1), ([5, 2, 7], 3, 4)])
def test_decode(prompts: list[int], replies: int, past: int) -> None:
    layout, R = Ragged.of(prompts), len(prompts) * replies
    q = torch.randn(R, H, 1, D, dtype=torch.float64)
    own_k, own_v = torch.randn(2, R, K, past, D, dtype=torch.float64)
    prompt_k, prompt_v = rows(sum(prompts), K, 3), rows(sum(prompts), K, 4)
    ours = decode_attention(q, own_k, own_v, layout.pad(prompt_k), layout.pad(prompt_v), layout.real, SCALE)
    for r in range(R):
        begin = sum(prompts[: r // replies])
        of_prompt = slice(begin, begin + prompts[r // replies])
        keys, values = (torch.cat([p[0, :, of_prompt], o[r]], 1) for p, o in ((prompt_k, own_k), (prompt_v, own_v)))
        torch.testing.assert_close(ours[r, :, 0], attend(q[r, :, 0], keys, values), rtol=0, atol=1e-12)


def test_pack_undoes_pad() -> None:
    layout = Ragged.of([3, 0, 5])
    packed = torch.randn(1, 2, 8, 4)
    assert layout.pad(packed).shape == (3, 2, 5, 4)
    assert torch.equal(layout.pack(layout.pad(packed)), packed)
    assert layout.real.sum(1).tolist() == [3, 0, 5]
