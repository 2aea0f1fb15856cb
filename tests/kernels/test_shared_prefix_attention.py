"""Packed and shared-prefix attention on every backend that runs here, against attention written out token by token in float64."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from locus_kernels.shared_prefix_attention import (
    Packed,
    Pairs,
    SharedPrefixLayout,
    backends,
    choose_backend,
    packed_attention,
    reference,
)
from locus_kernels.shared_prefix_attention import shared_prefix_attention as shared
from torch import Tensor

from tests.kernels.flash_attention_packages import Recorder

H, K, D, SCALE = 4, 2, 8, 0.3
HERE = ["plain", "torch"]
GROUPS = {
    "two groups": ([5, 3], [[4, 2], [1, 3]]),
    "a reply of length 1": ([4], [[1, 6, 2]]),
    "one group alone": ([9], [[3, 3, 3, 3]]),
    "groups of different sizes, an empty reply, a group without replies": ([5, 3, 7], [[4, 2, 0], [], [1]]),
    "64 groups": ([2 + i % 3 for i in range(64)], [[1 + (i + j) % 3 for j in range(2)] for i in range(64)]),
}


def rows(count: int, heads: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, heads, D, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query over all keys. q [H, D], k and v [n, K, D]."""
    k, v = (t.repeat_interleave(H // K, 1) for t in (k, v))
    return torch.einsum("hn,nhd->hd", (torch.einsum("hd,nhd->hn", q, k) * SCALE).softmax(-1), v)


def backend(name: str, dtype: torch.dtype = torch.float64) -> backends.Backend:
    return choose_backend(name, "cpu", dtype)


def same(ours: Tensor, truth: Tensor, inputs: list[Tensor], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, truth, rtol=0, atol=tolerance)
    direction = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(9))
    for a, b in zip(torch.autograd.grad((ours * direction).sum(), inputs), torch.autograd.grad((truth * direction).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def replies_truth(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, prompts: list[int], lengths: list[list[int]]) -> Tensor:
    truth, at, prompt = [], 0, 0
    for n, group in zip(prompts, lengths, strict=True):
        for length in group:
            for i in range(length):
                keys, values = (torch.cat([p[prompt : prompt + n], own[at : at + i + 1]]) for p, own in ((pk, k), (pv, v)))
                truth.append(attend(q[at + i], keys, values))
            at += length
        prompt += n
    return torch.stack(truth)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 7], [4, 0, 4], [2] * 64])
@pytest.mark.parametrize("causal", [True, False])
def test_packed(lengths: list[int], causal: bool, name: str) -> None:
    n, packed = sum(lengths), Packed.of(lengths)
    q, k, v = rows(n, H, 0), rows(n, K, 1), rows(n, K, 2)
    truth, start = [], 0
    for length in lengths:
        ends = [start + i + 1 if causal else start + length for i in range(length)]
        truth += [attend(q[start + i], k[start:end], v[start:end]) for i, end in enumerate(ends)]
        start += length
    same(packed_attention(q, k, v, Pairs(packed, packed, causal), scale=SCALE, backend=backend(name)), torch.stack(truth), [q, k, v])


@pytest.mark.parametrize("name", [*HERE, "reference"])
@pytest.mark.parametrize("case", GROUPS)
def test_shared_prefix(case: str, name: str) -> None:
    prompts, lengths = GROUPS[case]
    layout = SharedPrefixLayout.of(Packed.of(prompts), lengths)
    total = sum(map(sum, lengths))
    q, k, v = rows(total, H, 0), rows(total, K, 1), rows(total, K, 2)
    pk, pv = rows(sum(prompts), K, 3), rows(sum(prompts), K, 4)
    if name == "reference":
        ours = reference.shared_prefix_attention(q, k, v, pk, pv, layout, SCALE)
    else:
        ours = shared(q, k, v, pk, pv, layout, scale=SCALE, backend=backend(name))
    same(ours, replies_truth(q, k, v, pk, pv, prompts, lengths), [q, k, v, pk, pv])


@pytest.mark.parametrize("name", HERE)
def test_gradcheck_and_equal_bits(name: str) -> None:
    layout = SharedPrefixLayout.of(Packed.of([3, 2]), [[2, 1], [2]])
    inputs = [rows(n, h, i) for i, (n, h) in enumerate([(5, H), (5, K), (5, K), (5, K), (5, K)])]

    def run(*tensors: Tensor) -> Tensor:
        return shared(*tensors, layout, scale=SCALE, backend=backend(name))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.equal(run(*inputs), run(*inputs))


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_narrow_types_against_the_same_mathematics_done_eagerly(name: str, dtype: torch.dtype, head_dim: int) -> None:
    prompts, lengths = [37, 101], [[5, 1, 13], [7, 7, 2]]
    layout, rng = SharedPrefixLayout.of(Packed.of(prompts), lengths), torch.Generator().manual_seed(3)
    counts = [(35, 6), (35, 2), (35, 2), (138, 2), (138, 2)]
    inputs = [torch.randn(n, h, head_dim, generator=rng).to(dtype).requires_grad_() for n, h in counts]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    direction = torch.randn(35, 6, head_dim, generator=rng)

    def judged(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [out.detach().double(), *(g.double() for g in torch.autograd.grad((out * direction.to(out.dtype)).sum(), leaves))]

    scale = head_dim**-0.5
    truth = judged(reference.shared_prefix_attention(*wide, layout, scale), wide)
    eager = judged(reference.shared_prefix_attention(*inputs, layout, scale), inputs)
    ours = judged(shared(*inputs, layout, scale=scale, backend=backend(name, dtype)), inputs)
    for value, plain, exact in zip(ours, eager, truth, strict=True):
        assert (value - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6


def test_keys_are_views_of_any_strides() -> None:
    layout = SharedPrefixLayout.of(Packed.of([3, 2]), [[2, 1], [2]])
    q, k, v, pk, pv = (torch.randn(h, 5, D, dtype=torch.float64).transpose(0, 1) for h in (H, K, K, K, K))
    for name in HERE:
        out = shared(q, k, v, pk, pv, layout, scale=SCALE, backend=backend(name))
        torch.testing.assert_close(out, shared(*(t.contiguous() for t in (q, k, v, pk, pv)), layout, scale=SCALE, backend=backend(name)))


def test_no_tensor_is_larger_than_the_inputs_and_the_scores_of_no_pair_are_kept() -> None:
    """G replies over one prompt: nothing of the size of G prompts of keys is ever made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                if isinstance(t, Tensor):
                    largest = max(largest, t.untyped_storage().nbytes() // t.element_size())
            return out

    P, G, L = 512, 16, 4
    layout = SharedPrefixLayout.of(Packed.of([P]), [[L] * G])
    q, k, v, pk, pv = (rows(n, h, i, torch.float32) for i, (n, h) in enumerate([(G * L, H), (G * L, K), (G * L, K), (P, K), (P, K)]))
    with Largest():
        shared(q, k, v, pk, pv, layout, scale=SCALE, backend=backend("torch")).sum().backward()
    assert largest <= P * H * D  # the gradient of the prompt's keys before its query heads are summed


@pytest.mark.parametrize(
    ("maker", "module", "version"),
    [
        (backends._flash_attn_2, "flash_attn.flash_attn_interface", "two"),
        (backends._flash_attn_3, "flash_attn_interface", "three"),
        (backends._flash_attn_4, "flash_attn.cute.interface", "four"),
    ],
)
def test_flash_attention_packages_are_called_by_their_published_signatures(monkeypatch, maker, module: str, version: str) -> None:
    recorder = Recorder()
    monkeypatch.setattr(backends.importlib, "import_module", {module: getattr(recorder, version)()}.__getitem__)
    prompts, lengths = GROUPS["two groups"]
    q, k, v, pk, pv = rows(10, H, 0), rows(10, K, 1), rows(10, K, 2), rows(8, K, 3), rows(8, K, 4)
    ours = shared(q, k, v, pk, pv, SharedPrefixLayout.of(Packed.of(prompts), lengths), scale=SCALE, backend=maker())
    same(ours, replies_truth(q, k, v, pk, pv, prompts, lengths), [q, k, v, pk, pv])
    assert recorder.calls == ["forward"] * 2 + ["backward"] * 2


def test_pytorchs_packed_kernels_take_our_arguments() -> None:
    """On meta tensors: the schema and the shapes of the operators that CUDA runs."""
    packed = Packed.of([3, 5])
    pairs = Pairs(packed, packed, causal=True)
    q, k = (torch.empty(8, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    where = Pairs(*(Packed(packed.lengths, packed.cu_seqlens.to("meta")) for _ in range(2)), causal=True)
    out, lse = backends._torch_cuda().forward(q, k, k, where, 0.1)
    assert out.shape == q.shape
    assert lse.shape == (4, 8)
    dq, dk, _ = backends._torch_cuda().backward(out, q, k, k, out, lse, where, 0.1)
    assert (dq.shape, dk.shape) == (q.shape, k.shape)
    assert pairs.queries.longest == 5


class TestChoice:
    def test_auto_on_cpu(self) -> None:
        assert choose_backend("auto", "cpu", torch.float32).name == "torch"

    @pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
    def test_a_backend_asked_for_by_name_is_never_replaced(self, monkeypatch, name: str) -> None:
        for module in ("flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute.interface"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=f"{name}.*cannot be imported.*choose another, or auto"):
            choose_backend(name, "cuda", torch.bfloat16, (128,))

    def test_unfit(self, monkeypatch) -> None:
        for module in ("flash_attn", "flash_attn.flash_attn_interface"):
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        for kind, dtype, dims, words in [
            ("cpu", torch.bfloat16, (64,), "runs on CUDA"),
            ("cuda", torch.float32, (64,), "the model is in float32"),
            ("cuda", torch.bfloat16, (64, 260), "head dimensions of at most 256"),
        ]:
            with pytest.raises(ValueError, match=words):
                choose_backend("flash_attn_2", kind, dtype, dims)
        with pytest.raises(ValueError, match="expected auto or one of plain, torch"):
            choose_backend("xformers", "cpu", torch.float32)

    def test_auto_on_cuda(self, monkeypatch) -> None:
        for module in ("flash_attn.flash_attn_interface", "flash_attn_interface"):
            monkeypatch.setitem(sys.modules, module, None)
        assert choose_backend("auto", "cuda", torch.bfloat16, (128, 80)).name == "torch"
        assert choose_backend("auto", "cuda", torch.float32, (128, 80)).name == "plain"


def test_bad_input() -> None:
    layout = SharedPrefixLayout.of(Packed.of([3, 2]), [[2, 1], [2]])
    q, k, pk = torch.randn(5, H, D), torch.randn(5, K, D), torch.randn(5, K, D)

    def run(q=q, k=k, v=k, pk=pk, pv=pk):
        shared(q, k, v, pk, pv, layout, scale=1.0, backend=backend("torch"))

    for change, words in [
        ({"q": q[:4]}, r"q: expected \[5, heads, head_dim\]"),
        ({"k": k[:, :, :4]}, r"k: expected \[5, a divisor of 4, 8\]"),
        ({"pk": torch.randn(5, 3, D)}, r"prompt_k: expected \[5, a divisor of 4, 8\].*got \[5, 3, 8\]"),
        ({"pv": pk.double()}, "prompt_v: expected torch.float32 on cpu as q is, got torch.float64"),
    ]:
        with pytest.raises(ValueError, match=words):
            run(**change)
    with pytest.raises(ValueError, match="reply lengths of each of 2 prompts, got 1"):
        SharedPrefixLayout.of(Packed.of([3, 2]), [[1]])
