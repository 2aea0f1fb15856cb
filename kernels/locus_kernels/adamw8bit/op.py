"""The public 8-bit AdamW: `reference.py` for CPU tensors, `triton.py` for CUDA tensors, which raises where it
cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from locus_kernels.adamw8bit import reference


def new_state(parameter: Tensor) -> dict[str, Tensor]:
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


@torch.no_grad()
def adamw8bit_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
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
    words = [reference.key(seed, number) for number in streams]
    choices: dict[str, Any] = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "words": words}
    where: dict[str, Any] = {"lr": lr, "gradient_scale": gradient_scale, "corrections": corrections}
    if parameters[0].is_cuda:
        from locus_kernels.adamw8bit.triton import adamw8bit_triton  # a machine without CUDA needs no Triton

        adamw8bit_triton(parameters, gradients, states, **where, **choices)
    else:
        reference.adamw8bit_(parameters, gradients, states, **where, **choices)


def _check(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
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
