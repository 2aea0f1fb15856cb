"""The optimizers and their states: resumed, read in an earlier form, refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from locus_fast.errors import UserError
from locus_fast.step.optim import clip_and_step, parameter_groups, rate_factor
from locus_fast.step.optimizers import AdamW8bit, load_state_tensors, make_optimizer, state_tensors
from locus_fast.weights.checkpoint import (
    TINY_BASE,
    latest_checkpoint,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from tests.locus_fast.step.optim_cases import ALL, NEEDS, STEP, give, made, weights


@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_resuming_gives_the_same_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Through a file, into an optimizer that has taken other steps and one that has taken none."""
    parameters, optimizer = made(name, weights(dtype))
    for step in range(3):
        give(parameters, step)
        clip_and_step(optimizer, **{**STEP, "seed": step})
    save_file(state_tensors(optimizer), tmp_path / "state.safetensors")
    saved = [p.detach().clone() for p in parameters]
    resumed = [made(name, saved) for _ in range(2)]
    give(resumed[1][0], 77)
    clip_and_step(resumed[1][1], **STEP)
    for ours, other in resumed:
        load_state_tensors(other, load_file(tmp_path / "state.safetensors"))
        with torch.no_grad():
            for p, value in zip(ours, saved, strict=True):
                p.copy_(value)
    for step in (3, 4):
        for some, one in ((parameters, optimizer), *resumed):
            give(some, step)
            clip_and_step(one, **{**STEP, "seed": step})
    for ours, other in resumed:
        assert all(torch.equal(p, q) for p, q in zip(ours, parameters, strict=True))
        assert all(
            torch.equal(value, state_tensors(optimizer)[key]) for key, value in state_tensors(other).items()
        )


def test_states_with_dynamic_codes_are_read_and_gone_on_from() -> None:
    """As torchao's AdamW8bit writes them, which earlier versions trained with: the next steps are those of
    AdamW on the moments that it reads from its own state."""
    peer = pytest.importorskip("torchao.optim").AdamW8bit
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    theirs, (ours, optimizer) = (
        torch.nn.Parameter(start.clone()),
        made("adamw8bit", [start], weight_decay=0.0),
    )
    before = peer([theirs], lr=torch.tensor(1e-3), weight_decay=0.0)
    gradients = [torch.randn(64, 128, generator=torch.Generator().manual_seed(step)) for step in range(1, 12)]
    for gradient in gradients[:10]:
        theirs.grad = gradient
        with torch.compiler.set_stance("force_eager"):
            before.step()
    state = before.state[theirs]
    saved = {"0.step": state["step"].clone()}
    for key in ("exp_avg", "exp_avg_sq"):
        saved |= {f"0.{key}.codes": state[key].codes.clone(), f"0.{key}.scale": state[key].scale.clone()}
    load_state_tensors(optimizer, saved)
    with torch.no_grad():
        ours[0].copy_(theirs)
    twin = torch.nn.Parameter(theirs.detach().clone())
    expected = torch.optim.AdamW([twin], lr=1e-3, weight_decay=0.0)
    moments = {key: state[key].dequantize() for key in ("exp_avg", "exp_avg_sq")}
    expected.state[twin] = {"step": torch.tensor(10.0), **moments}
    ours[0].grad, twin.grad = gradients[10], gradients[10].clone()
    clip_and_step(optimizer, **STEP)
    expected.step()
    held = moments["exp_avg_sq"] > 0
    step = (twin - theirs)[held]
    assert ((ours[0] - twin)[held].norm() / step.norm()).item() < 0.05


def test_a_checkpoint_holds_8_bit_states(tmp_path: Path) -> None:
    """And is refused by another optimizer in one sentence."""
    device, rates = torch.device("cpu"), {"vision": 0.0, "projector": 1e-3, "language": 1e-4}
    models = [load_model(TINY_BASE, device)[0] for _ in range(2)]
    one, other = (make_optimizer("adamw8bit", parameter_groups(model, rates), 0.01) for model in models)
    for p in models[0].parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    clip_and_step(one, **STEP)
    save_checkpoint(tmp_path, models[0], TINY_BASE, one, 1)
    folder, step = latest_checkpoint(tmp_path)
    assert step == 1
    load_checkpoint(folder, models[1], other)
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert all(torch.equal(value, state_tensors(one)[key]) for key, value in state_tensors(other).items())
    with pytest.raises(UserError, match="state is of another optimizer"):
        load_checkpoint(folder, models[1], make_optimizer("adamw", parameter_groups(models[1], rates), 0.01))


def test_a_state_of_another_optimizer_is_refused() -> None:
    _, one = made("adamw-master", weights(torch.bfloat16))
    _, other = made("adamw", weights(torch.float32))
    with pytest.raises(ValueError, match=r"3 tensors, the first 0\.master"):
        load_state_tensors(other, state_tensors(one))
    _, shorter = made("adamw", [torch.zeros(64, 64), *weights(torch.float32)[1:]])
    with pytest.raises(
        ValueError, match=r"0\.exp_avg: expected torch.float32 \[64, 128\], got torch.float32 \[64, 64\]"
    ):
        load_state_tensors(other, state_tensors(shorter))


def test_8_bit_states_are_small() -> None:
    """Two bytes a parameter, and three float32 of each block of 256."""
    _, optimizer = made("adamw8bit", [torch.zeros(256, 256, dtype=torch.bfloat16)])
    assert sum(t.nbytes for t in state_tensors(optimizer).values()) == 2 * 65536 + 3 * 4 * 256 + 4


def test_8_bit_states_fit_as_well() -> None:
    """A regression with noise: the loss that float32 AdamW reaches, with each of the others within a tenth of
    it."""
    losses = {}
    for name, dtype in ALL:
        rng = torch.Generator().manual_seed(0)
        x, truth, noise = (torch.randn(shape, generator=rng) for shape in ((512, 64), (64, 64), (512, 64)))
        (w,), optimizer = made(name, [torch.zeros(64, 64, dtype=dtype)], rate=0.1, weight_decay=0.0)
        for step in range(100):
            w.grad = None
            loss = (x.to(dtype) @ w - (x @ truth + noise).to(dtype)).float().square().mean()
            loss.backward()
            clip_and_step(
                optimizer, denominator=1, factor=rate_factor(step, 100, 0.1, "cosine"), clip=10.0, seed=step
            )
        losses[name, dtype] = loss.item()
    truth = losses["adamw", torch.float32]
    assert truth < 1
    assert all(loss == pytest.approx(truth, rel=0.1) for loss in losses.values()), losses


def test_auto_goes_by_the_weights() -> None:
    assert isinstance(made("auto", weights(torch.float32))[1], torch.optim.AdamW)
    assert isinstance(made("auto", weights(torch.bfloat16))[1], AdamW8bit)


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_library_is_named(name: str, monkeypatch) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == NEEDS[name]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, NEEDS[name], None)
    with pytest.raises(
        UserError, match=rf"--optimizer {name} needs {NEEDS[name]}, .* pip install 'locus-fast\[optim\]'"
    ):
        make_optimizer(name, [{"params": [torch.nn.Parameter(torch.zeros(3))], "rate": 1.0}], 0.0)


@pytest.mark.parametrize(
    ("name", "dtype", "sentence"),
    [
        ("sgd", torch.float32, "--optimizer must be one of auto, adamw"),
        ("adamw", torch.bfloat16, "rounds small steps of bfloat16 weights away"),
        ("bnb-adamw8bit", torch.bfloat16, "rounds small steps of bfloat16 weights away"),
    ],
)
def test_what_cannot_be_made(name: str, dtype: torch.dtype, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make_optimizer(
            name, [{"params": [torch.nn.Parameter(torch.zeros(3, dtype=dtype))], "rate": 1.0}], 0.0
        )
