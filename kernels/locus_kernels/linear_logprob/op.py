"""`linear_logprob`: registration with PyTorch, so that it differentiates and survives `torch.compile`, and
the public function.

CPU tensors take `reference.py`, CUDA tensors `triton.py`, which raises where it cannot run. Legend: T tokens,
V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from locus_kernels.linear_logprob import reference


def backend(tensor: Tensor) -> ModuleType:
    """The module whose `forward` and `backward` run on this tensor's device. Triton is imported on first use:
    CPU machines need not have it."""
    if tensor.is_cuda:
        from locus_kernels.linear_logprob import triton as kernels

        return kernels
    return reference


@torch.library.custom_op("locus_kernels::linear_logprob", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    return backend(hidden).forward(hidden, weight, ids, temperature, softcap)


@_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.compute_dtype(hidden.dtype)
    logprob, entropy, lse = (
        hidden.new_empty(hidden.shape[0], dtype=kind) for kind in (dtype, dtype, torch.float64)
    )
    return logprob, entropy, lse


@torch.library.custom_op("locus_kernels::linear_logprob_backward", mutates_args=())
def gradients(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    lse: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float | None,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; see `reference.backward`."""
    return backend(hidden).backward(
        grad_logprob,
        grad_entropy,
        hidden,
        weight,
        ids,
        lse,
        entropy,
        temperature,
        softcap,
        want_hidden,
        want_weight,
    )


@gradients.register_fake
def _(
    grad_logprob,
    grad_entropy,
    hidden,
    weight,
    ids,
    lse,
    entropy,
    temperature,
    softcap,
    want_hidden,
    want_weight,
):
    return hidden.new_empty(hidden.shape if want_hidden else (0,)), weight.new_empty(
        weight.shape if want_weight else (0,)
    )


def _setup(ctx, inputs, output) -> None:
    hidden, weight, ids, ctx.temperature, ctx.softcap = inputs
    _, entropy, lse = output
    ctx.set_materialize_grads(False)  # an unused entropy costs nothing in backward
    ctx.save_for_backward(hidden, weight, ids, lse, entropy)


def _backward(ctx, grad_logprob: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None):
    hidden, weight, ids, lse, entropy = ctx.saved_tensors
    if grad_logprob is None:
        grad_logprob = torch.zeros_like(entropy)
    wanted = ctx.needs_input_grad[:2]
    both = gradients(
        grad_logprob, grad_entropy, hidden, weight, ids, lse, entropy, ctx.temperature, ctx.softcap, *wanted
    )
    return (
        *(gradient if want else None for gradient, want in zip(both, wanted, strict=True)),
        None,
        None,
        None,
    )


_forward.register_autograd(_backward, setup_context=_setup)


def check_head(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, softcap: float | None, validate: bool
) -> None:
    """ValueError unless the head's arguments fit each other. Reads values only where `validate` is set."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [T, D] and weight [V, D], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if ids.shape != hidden.shape[:1]:
        raise ValueError(f"expected ids [{hidden.shape[0]}], one a row of hidden, got {list(ids.shape)}")
    if weight.shape[0] == 0:
        raise ValueError("expected a weight with at least one vocabulary row, got none")
    known = (
        (torch.float16, torch.bfloat16, torch.float32)
        if hidden.is_cuda
        else (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    )
    if hidden.dtype not in known or weight.dtype != hidden.dtype:
        raise ValueError(
            f"expected hidden and weight of one dtype of {known} on {hidden.device.type}, got {hidden.dtype} and {weight.dtype}"
        )
    if ids.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"expected integer ids, got {ids.dtype}")
    if weight.device != hidden.device or ids.device != hidden.device:
        raise ValueError(
            f"expected one device, got hidden on {hidden.device}, weight on {weight.device}, ids on {ids.device}"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"expected a finite temperature above 0, got {temperature}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"expected a finite softcap above 0, or None, got {softcap}")
    if validate and len(ids) and not bool(((ids >= 0) & (ids < len(weight))).all()):
        raise ValueError(f"expected ids in [0, {len(weight)}), got {int(ids.min())} to {int(ids.max())}")


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    *,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each id, and the entropy, under softmax(cap(hidden @ weight.T) / temperature),
    without a [T, V] tensor.

    hidden [T, D] and weight [V, D]: one dtype of float32, float16, bfloat16 (float64 too on the CPU), any row
    stride; ids integer [T] in [0, V). softcap: cap(x) = softcap * tanh(x / softcap) before the temperature;
    None for no cap.
    Returns (log-prob [T], entropy [T]) in nats, float32 (float64 for float64). Both are differentiable in
    hidden and weight, once; a weight or a hidden that needs no gradient costs none. Logits are summed and
    kept in float32 whatever the inputs' dtype.

    ValueError on shapes, dtypes, devices or numbers that do not fit. An id outside [0, V) gives a log-prob of
    NaN, or ValueError with `validate`, which reads the ids and so synchronises with a GPU.
    """
    check_head(hidden, weight, ids, temperature, softcap, validate)
    logprob, entropy, _ = _forward(
        hidden, weight, ids.long(), float(temperature), None if softcap is None else float(softcap)
    )
    return logprob, entropy
