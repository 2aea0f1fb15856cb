"""The reference policy by kind: it stays what it was while the policy moves, exactly or but for quantisation,
and shares what is frozen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from locus_fast import train
from locus_fast.errors import UserError
from locus_fast.model.attention import use_attention
from locus_fast.model.quantize import PROJECTIONS, Int8Linear, language_linears, quantize, weight_of
from locus_fast.model.reference import make_reference
from locus_fast.step.optim import parameter_groups
from tests.locus_fast.adapter_cases import CPU, logprobs, needs_peft, tiny

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHORT = [
    "--steps",
    "2",
    "--prompts",
    "4",
    "--eval-cues",
    "6",
    "--microbatch-tokens",
    "1500",
    "--device",
    "cpu",
]
EXACT = ("auto", "copy", "host")


def places_of(model) -> list[tuple]:
    parents = [
        parent for layer in model.model.language_model.layers for parent in (layer.self_attn, layer.mlp)
    ]
    return [
        (parent, name) for parent in parents for name, _ in parent.named_children() if name in PROJECTIONS
    ]


def move(model) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def error_of(kind: str) -> float:
    """Mean difference of log-probs to the base's, after the policy has moved."""
    model = tiny()
    with torch.no_grad():
        base = logprobs(model)
        reference = make_reference(model, kind)
        move(model)
        assert (logprobs(model) - base).abs().mean() > 0.5
        with reference.model() as held:
            first = logprobs(held)
        with reference.model() as held:
            assert torch.equal(logprobs(held), first)
    return float((first - base).abs().mean())


@pytest.mark.parametrize("kind", EXACT)
def test_it_stays_the_base(kind: str) -> None:
    assert error_of(kind) == 0


def test_quantised_it_is_nearly_the_base() -> None:
    """On random prompts and replies, whose log-probs are about -13: the small model feels 4 bits more than a
    large one."""
    pytest.importorskip("bitsandbytes")
    eight, four = error_of("int8"), error_of("nf4")
    assert 0 < eight < 0.1
    assert eight < four < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "out", "within", "bias"), [(0, 5, 3, True), (1, 7, 33, False), (37, 130, 65, True)]
)
def test_int8_layer(rows: int, out: int, within: int, bias: bool, dtype: torch.dtype) -> None:
    """Against float64 with the same codes: the error of the dtype alone; against the weights: half a code,
    1/254 of a row's largest."""
    rng = torch.Generator().manual_seed(rows)
    codes = torch.randint(-127, 128, (out, within), generator=rng, dtype=torch.int8)
    scale, shift = torch.rand(out, generator=rng) / 127, torch.randn(out, generator=rng) if bias else None
    x = torch.randn(2, rows, within, generator=rng).to(dtype)
    got = Int8Linear(codes, scale, shift if shift is None else shift.to(dtype))(x)
    truth = x.double() @ (codes.double() * scale[:, None].double()).T + (
        0 if shift is None else shift.to(dtype).double()
    )
    eager = torch.nn.functional.linear(
        x, (codes * scale[:, None]).to(dtype), shift if shift is None else shift.to(dtype)
    )
    assert got.shape == (2, rows, out)
    assert got.dtype == dtype
    assert (got - truth).abs().sum() <= 2 * (eager - truth).abs().sum() + 1e-6 * got.numel()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights(kind: str) -> None:
    """Every one of the language model's linear layers, in 8 bits to half a code (and float16's rounding), in
    4 to 15% on average."""
    pytest.importorskip("bitsandbytes")
    plain, model = tiny(), tiny()
    quantize(model, kind, CPU)
    pairs = [
        (a.weight, getattr(parent, name))
        for (_, _, a), (parent, name) in zip(language_linears(plain), places_of(model), strict=True)
    ]
    assert len(pairs) == 4 * 7
    for weight, layer in pairs:
        if kind == "int8":
            error = (layer.codes * layer.scale[:, None] - weight).abs()
            assert (error <= 0.65 * layer.scale[:, None]).all()
        else:
            error = (weight_of(layer) - weight).abs()
            assert error.mean() < 0.15 * weight.abs().mean()


@pytest.mark.parametrize("kind", ["copy", "host", "int8", "nf4"])
def test_it_shares_what_is_not_trained(kind: str) -> None:
    if kind in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    model = tiny()
    parameter_groups(model, {"vision": 0.0, "projector": 1.0, "language": 1.0})
    held = make_reference(model, kind).held
    ours, theirs = dict(model.named_parameters()), dict(held.named_parameters())
    assert {name for name in theirs if theirs[name] is ours.get(name)} == {
        name for name, p in ours.items() if not p.requires_grad
    }
    assert not any(p.requires_grad for p in theirs.values())
    assert any(p.requires_grad for p in ours.values())


def test_making_it_leaves_the_policy_alone() -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for kind in ("int8", "nf4", "host", "copy"):
        make_reference(model, kind)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())


def test_hooks_are_gone_after_the_pass() -> None:
    reference = make_reference(tiny(), "host")
    with pytest.raises(KeyError), reference.model():
        raise KeyError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in reference.held.modules())
    assert all(p.data_ptr() == page.data_ptr() for p, page in reference.pages.items())


@needs_peft
def test_with_adapters_it_is_the_policy_without_them() -> None:
    from locus_fast.model.adapters import add_adapters
    from tests.locus_fast.adapter_cases import scatter

    model = tiny()
    with torch.no_grad():
        base = logprobs(model)
        add_adapters(model, 4, 8.0)
        reference = make_reference(model)
        scatter(model)
        assert reference.held is model
        with reference.model() as held:
            assert torch.equal(logprobs(held), base)
    with pytest.raises(UserError, match="leave the option away"):
        make_reference(model, "nf4")


def kl_of(out: Path, *options: str) -> list[float]:
    assert train.main([*SHORT, "--out", str(out), *options]) == 0
    return [json.loads(line)["kl"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_runs(tmp_path: Path) -> None:
    """By the command: paged to the host is the copy to the bit; a quantised one starts with the KL of its own
    error."""
    copied = kl_of(tmp_path / "copy")
    assert copied[0] == 0 < copied[1]
    assert kl_of(tmp_path / "host", "--reference", "host") == copied
    pytest.importorskip("bitsandbytes")
    assert kl_of(tmp_path / "int8", "--reference", "int8")[0] > 0


@pytest.mark.gpu
@CUDA
def test_on_cuda_a_paged_layer_is_there_only_while_it_computes() -> None:
    model = tiny().to("cuda")
    use_attention(model)
    reference = make_reference(model, "host")
    assert all(page.is_pinned() for page in reference.pages.values())
    layers = reference.held.model.language_model.layers
    there: list[list[bool]] = []
    layers[2].mlp.register_forward_hook(
        lambda *_: there.append([all(p.is_cuda for p in layer.parameters()) for layer in layers])
    )
    with torch.no_grad():
        base = logprobs(model)
        move(model)
        for _ in range(2):
            with reference.model() as held:
                torch.testing.assert_close(logprobs(held), base, rtol=0, atol=1e-5)
            assert not any(p.is_cuda for p in held.parameters())
    assert set(map(tuple, there)) == {(False, False, True, False)}


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("kind", ["copy", "int8", "nf4"])
def test_kinds_on_cuda(kind: str) -> None:
    if kind != "copy":
        pytest.importorskip("bitsandbytes")
    model = tiny().to("cuda", torch.bfloat16)
    use_attention(model)
    with torch.no_grad():
        base = logprobs(model)
        reference = make_reference(model, kind)
        move(model)
        with reference.model() as held:
            assert (logprobs(held) - base).abs().mean() < {"copy": 1e-6, "int8": 0.3, "nf4": 2.0}[kind]
