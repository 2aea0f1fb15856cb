"""What moves the weights: groups, schedule, optimizers, and a step that reads nothing back."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from locus_fast.errors import UserError
from locus_fast.model.families import FAMILIES, QWEN3_VL, Family, part_of
from locus_fast.step.optim import clip_and_step, parameter_groups, rate_factor
from locus_fast.step.optimizers import state_tensors
from tests.locus_fast.step.optim_cases import ALL, ON_DEVICE, STEP, give, made, weights
from tests.small_models import small_model


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_every_parameter_is_in_one_group(family: str) -> None:
    model = small_model(family)
    groups = {
        group["part"]: group
        for group in parameter_groups(model, {"vision": 1.0, "projector": 2.0, "language": 3.0})
    }
    assert {part: group["rate"] for part, group in groups.items()} == {
        "vision": 1.0,
        "projector": 2.0,
        "language": 3.0,
    }
    ours = {id(p): part for part, group in groups.items() for p in group["params"]}
    assert (
        sum(len(group["params"]) for group in groups.values()) == len(ours) == len(list(model.parameters()))
    )
    core = model.model
    for part, module in (
        ("language", core.language_model),
        ("language", model.lm_head),
        ("vision", core.visual.blocks),
        ("projector", core.visual.merger),
    ):
        assert {ours[id(p)] for p in module.parameters()} == {part}
    if family == "qwen3_vl":
        assert {ours[id(p)] for p in core.visual.deepstack_merger_list.parameters()} == {"projector"}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_names_of_parts(family: Family) -> None:
    def part(name: str) -> str:
        return part_of(name, family)

    assert part("base_model.model.model.visual.blocks.0.attn.qkv.lora_A.default.weight") == "vision"
    assert part("visual.merger.mlp.0.bias") == "projector"
    if family.architecture is QWEN3_VL:
        assert part("model.visual.deepstack_merger_list.1.norm.weight") == "projector"
    assert part("lm_head.weight") == part("model.language_model.embed_tokens.weight") == "language"


def test_a_rate_of_0_freezes() -> None:
    model = small_model("qwen3_vl")
    groups = parameter_groups(model, {"vision": 0.0, "projector": 0.0, "language": 1e-3})
    assert [group["part"] for group in groups] == ["language"]
    assert not any(p.requires_grad for p in model.model.visual.parameters())
    assert all(p.requires_grad for p in model.model.language_model.parameters())
    with pytest.raises(UserError, match="nothing is left to train"):
        parameter_groups(model, dict.fromkeys(("vision", "projector", "language"), 0.0))


def test_tied_weights_are_in_one_group_once() -> None:
    model = small_model("qwen3_vl")
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    (language,) = parameter_groups(model, {"vision": 0.0, "projector": 0.0, "language": 1.0})
    assert sum(p is model.lm_head.weight for p in language["params"]) == 1


def test_rate_factor() -> None:
    assert [rate_factor(step, 8, 0.5, "constant") for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert [rate_factor(step, 3, 0.0, "constant") for step in range(3)] == [1, 1, 1]
    cosine = [rate_factor(step, 6, 0.5, "cosine") for step in range(6)]
    assert cosine == pytest.approx([1 / 3, 2 / 3, 1, 0.5 + 0.5 / math.sqrt(2), 0.5, 0.5 - 0.5 / math.sqrt(2)])
    assert [rate_factor(step, 3, 0.0, "cosine") for step in range(3)] == pytest.approx([1, 0.75, 0.25])
    assert [rate_factor(step, 4, 1.0, "cosine") for step in range(4)] == [0.25, 0.5, 0.75, 1]
    assert rate_factor(0, 1, 0.0, "cosine") == rate_factor(0, 1, 1.0, "cosine") == 1
    for warmup in (0.0, 0.05, 0.3, 1.0):
        assert all(
            rate_factor(s, 37, warmup, "constant") == min(1.0, (s + 1) / max(1.0, warmup * 37))
            for s in range(37)
        )


def test_adamw_is_torchs() -> None:
    """As torch.optim.AdamW on gradients divided and clipped by torch, at the rate times the factor; the order
    of the divisions differs."""
    ours, optimizer = made("adamw", weights(torch.float32), rate=1e-2)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.01, fused=True)
    for step in range(4):
        give(ours, step)
        give(theirs, step)
        for p in theirs:
            p.grad /= 8
        expected = torch.nn.utils.clip_grad_norm_(theirs, 3.0)
        reference.param_groups[0]["lr"] = torch.tensor(1e-2 * 0.5)
        reference.step()
        norm = clip_and_step(optimizer, denominator=8, factor=0.5, clip=3.0, seed=step)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        assert norm > 3
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_by_hand(dtype: torch.dtype) -> None:
    (p, q), optimizer = made(
        "auto" if dtype == torch.float32 else "adamw-master",
        [torch.zeros(1, dtype=dtype), torch.zeros(2, dtype=dtype)],
    )
    for clip, expected in ((1.0, [0.5, 0.0, 0.0]), (5.0, [1.5, 2.0, 0.0])):
        p.grad, q.grad = torch.tensor([6.0], dtype=dtype), torch.tensor([8.0, 0.0], dtype=dtype)
        norm = clip_and_step(optimizer, denominator=4, factor=1.0, clip=clip, seed=0)
        assert norm.item() == 2.5
        assert norm.dtype == torch.float32
        if clip == 5.0:
            assert torch.cat([p.grad, q.grad]).tolist() == expected
        else:
            assert torch.cat([p.grad, q.grad]).float().norm().item() == pytest.approx(1.0, rel=4e-3)


def test_the_norm_of_bfloat16_gradients_is_a_float32_sum() -> None:
    """In bfloat16 the sum of 40,000 ones stops growing at 256."""
    (p,), optimizer = made("adamw-master", [torch.zeros(40_000, dtype=torch.bfloat16)])
    p.grad = torch.ones_like(p)
    assert clip_and_step(optimizer, **STEP).item() == pytest.approx(200.0, rel=1e-6)


class Watch(TorchDispatchMode):
    """Raises where a tensor's value goes to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().split("::")[1].split(".")[0] not in (
            "_local_scalar_dense",
            "is_nonzero",
            "equal",
            "item",
        ), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "dtype"), ON_DEVICE)
def test_nothing_is_read_back(name: str, dtype: torch.dtype) -> None:
    parameters, optimizer = made(name, weights(dtype))
    with pytest.raises(AssertionError), Watch():
        bool(parameters[0].sum() > 0)
    for step in range(2):
        give(parameters, step)
        with Watch():
            clip_and_step(optimizer, denominator=3, factor=0.5, clip=1.0, seed=step)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "dtype"), ON_DEVICE)
def test_nothing_waits_for_the_device(name: str, dtype: torch.dtype) -> None:
    parameters, optimizer = made(name, weights(dtype, device="cuda"))
    try:
        for step in range(3):
            give(parameters, step)
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step may compile
            norm = clip_and_step(optimizer, denominator=3, factor=0.5, clip=1.0, seed=step)
            torch.cuda.set_sync_debug_mode("default")
            assert norm.isfinite()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("name", "dtype"), ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(name: str, dtype: torch.dtype, bad: float) -> None:
    """Not even with momentum and decay at work; and the next step is a step again."""
    parameters, optimizer = made(name, weights(dtype))
    give(parameters, 0)
    clip_and_step(optimizer, **STEP)
    give(parameters, 1)
    parameters[1].grad[3] = bad
    before = [p.detach().clone() for p in parameters]
    assert not clip_and_step(optimizer, **STEP).isfinite()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    give(parameters, 2)
    assert clip_and_step(optimizer, **STEP).isfinite()
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert all(value.isfinite().all() for value in state_tensors(optimizer).values())


@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_without_gradients_nothing_moves(name: str, dtype: torch.dtype) -> None:
    parameters, optimizer = made(name, weights(dtype))
    before = state_tensors(optimizer)
    norm = clip_and_step(optimizer, denominator=0, factor=1.0, clip=1.0, seed=0)
    assert norm.tolist() == 0
    assert all(torch.equal(p, w) for p, w in zip(parameters, weights(dtype), strict=True))
    assert all(torch.equal(value, before[key]) for key, value in state_tensors(optimizer).items())


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("adamw8bit", 0.95e-3, 1.05e-3), ("adamw-master", 0.95e-3, 1.05e-3), ("torch", 0.0, 0.0)],
)
@pytest.mark.parametrize("shape", [(16, 256), (1000,)])
def test_a_thousand_steps_of_a_millionth(name: str, low: float, high: float, shape: tuple[int, ...]) -> None:
    """A bfloat16 weight of 0.02 goes 1e-3 on average, tensors too small for 8-bit blocks too; with plain
    bfloat16 AdamW it goes nowhere."""
    start = torch.full(shape, 0.02, dtype=torch.bfloat16)
    if name == "torch":
        parameters = [torch.nn.Parameter(start.clone())]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)
    else:
        parameters, optimizer = made(name, [start], rate=1e-6, weight_decay=0.0)
    for step in range(1000):
        parameters[0].grad = torch.ones_like(start)
        optimizer.step() if name == "torch" else clip_and_step(optimizer, **{**STEP, "seed": step})
    moved = (start.double() - parameters[0].detach().double()).mean().item()
    assert low <= moved <= high


@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_a_step_depends_on_its_seed_alone(name: str, dtype: torch.dtype) -> None:
    ends = []
    for seed in (3, 3, 4):
        parameters, optimizer = made(name, weights(dtype))
        torch.rand(len(ends))  # the global generator is elsewhere each time
        state = torch.get_rng_state()
        give(parameters, 0)
        clip_and_step(optimizer, **{**STEP, "seed": seed})
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2]) == (not (name == "adamw8bit" and dtype == torch.bfloat16))
