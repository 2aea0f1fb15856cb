"""The public 8-bit AdamW: one registered operator, so that it survives `torch.compile`; the reference on CPU,
the kernel on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from locus_kernels.adamw8bit import reference
from locus_kernels.adamw8bit.reference import Scalars, Settings, State
from locus_kernels.dispatch import implementation

BLOCKED = ("exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_low", "exp_avg_sq_high")
PLAIN = ("exp_avg", "exp_avg_sq")


def _names(parameter: Tensor) -> tuple[str, ...]:
    """What the state of a parameter holds besides its step."""
    return BLOCKED if reference.has_blocks(parameter) else PLAIN


# --------------------------------------------------------------------------------------------------- operator
@torch.library.custom_op("locus_kernels::adamw8bit_", mutates_args=("parameters", "moments"))
def _operator(
    parameters: list[Tensor],
    gradients: list[Tensor],
    moments: list[Tensor],
    lr: list[Tensor],
    gradient_scale: Tensor,
    corrections: Tensor,
    settings: list[float],
    words: list[int],
) -> None:
    """moments: of one parameter after the other, in the order of `_names`; words: two a parameter."""
    flat = iter(moments)
    states = [{name: next(flat) for name in _names(parameter)} for parameter in parameters]
    pairs = list(zip(words[::2], words[1::2], strict=True))
    scalars = Scalars(lr, gradient_scale, corrections)
    run = implementation(reference, gradient_scale).adamw8bit_
    run(parameters, gradients, states, scalars, Settings(*settings), pairs)


@_operator.register_fake
def _shapes(*_: Any) -> None:
    """Nothing is returned."""


# ----------------------------------------------------------------------------------------------------- public
def new_state(parameter: Tensor) -> State:
    """The state of a parameter (float32 or bfloat16) before its first step, on its device.

    step: float32 []. For 4,096 elements or more in whole blocks of 256: exp_avg_codes int8 and
    exp_avg_sq_codes uint8 of the parameter's shape; exp_avg_scale, exp_avg_sq_low and exp_avg_sq_high,
    float32 [elements / 256]. For other parameters: exp_avg and exp_avg_sq, float32 of the parameter's shape.
    """
    state = {"step": torch.zeros((), device=parameter.device)}
    if not reference.has_blocks(parameter):
        names = ("exp_avg", "exp_avg_sq")
        zeros = (torch.zeros(parameter.shape, device=parameter.device) for _ in names)
        return state | dict(zip(names, zeros, strict=True))
    blocks = parameter.numel() // reference.BLOCK
    for name, dtype in (("exp_avg_codes", torch.int8), ("exp_avg_sq_codes", torch.uint8)):
        state[name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
    for name in ("exp_avg_scale", "exp_avg_sq_low", "exp_avg_sq_high"):
        state[name] = torch.zeros(blocks, device=parameter.device)
    return state


def _check(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    lr: Sequence[Tensor],
    gradient_scale: Tensor,
    streams: Sequence[int],
) -> None:
    counts = {len(each) for each in (parameters, gradients, states, lr, streams)}
    if len(counts) > 1:
        raise ValueError(
            f"expected a gradient, a state, a rate and a stream for each parameter, got {sorted(counts)}"
        )
    device = parameters[0].device
    for parameter, gradient, state, rate in zip(parameters, gradients, states, lr, strict=True):
        for name, tensor in (("parameter", parameter), ("gradient", gradient)):
            if tensor.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"{name}: expected float32 or bfloat16, got {tensor.dtype}")
        if gradient.shape != parameter.shape or not parameter.is_contiguous():
            shapes = f"{list(gradient.shape)} for {list(parameter.shape)}"
            raise ValueError(
                f"expected gradients of their parameters' shapes, and contiguous parameters, got {shapes}"
            )
        for name, scalar in (("lr", rate), ("gradient_scale", gradient_scale)):
            if scalar.dtype != torch.float32 or scalar.dim():
                raise ValueError(f"{name}: expected float32 [], got {scalar.dtype} {list(scalar.shape)}")
        codes = state.get("exp_avg_codes", state.get("exp_avg"))
        if (
            codes is None
            or codes.shape != parameter.shape
            or ("exp_avg" in state) == reference.has_blocks(parameter)
        ):
            raise ValueError(
                f"expected the state of a parameter of shape {list(parameter.shape)}, see new_state"
            )
        if {t.device for t in (parameter, gradient, rate, gradient_scale, *state.values())} != {device}:
            raise ValueError(f"expected every tensor on {device}")


@torch.no_grad()
def adamw8bit_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    *,
    lr: Sequence[Tensor],
    gradient_scale: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    seed: int,
    streams: Sequence[int],
) -> None:
    """One step of AdamW on every parameter, in place, with moments of 8 bits (see `reference.py` for their
    form).

    parameters: float32 or bfloat16, contiguous; bfloat16 ones are rounded stochastically. gradients: of the
    same shapes, in any of the two dtypes; they are read, times `gradient_scale`, and not written to. states:
    as `new_state` makes them. lr: float32 [] for each parameter; gradient_scale: float32 [], 0 for gradients
    that count as 0 whatever they hold. Both are read on the device.
    seed, streams: a parameter's random bits follow from the seed, its stream and each element's number alone.

    Nothing is read back from the device. On CUDA: a launch for each pair of a weight's and a gradient's dtype
    and for each of the two forms of state, whatever the number of parameters.
    Raises ValueError for counts, dtypes, shapes, devices or layouts that do not fit.
    """
    if not parameters:
        return
    _check(parameters, gradients, states, lr, gradient_scale, streams)
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1.0)
    count = torch.stack(steps).double()
    # in float64: in float32, 1 - 0.999 is off by 5e-5 of itself
    corrections = torch.stack([1 - beta**count for beta in betas], 1).float()
    moments = [
        state[name] for parameter, state in zip(parameters, states, strict=True) for name in _names(parameter)
    ]
    words = [word for stream in streams for word in reference.key(seed, stream)]
    scalars = Scalars(list(lr), gradient_scale, corrections)
    _operator(list(parameters), list(gradients), moments, *scalars, [*betas, eps, weight_decay], words)
