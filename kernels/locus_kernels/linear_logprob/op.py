"""`linear_logprob`: registration with PyTorch, so that it differentiates and survives `torch.compile`, and
the public function.

Legend: T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from locus_kernels.dispatch import implementation
from locus_kernels.linear_logprob import reference
from locus_kernels.linear_logprob.records import Saved, Scale, Slope, Wanted


# -------------------------------------------------------------------------------------------------- operators
@torch.library.custom_op("locus_kernels::linear_logprob", mutates_args=())
def _operator(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(reference, hidden).forward(hidden, weight, ids, Scale(temperature, softcap))


@_operator.register_fake
def _shapes(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = hidden.shape[0], reference.compute_dtype(hidden.dtype)
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=torch.float64),
    )


@torch.library.custom_op("locus_kernels::linear_logprob_backward", mutates_args=())
def _backward_operator(
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
    slope, saved = Slope(grad_logprob, grad_entropy), Saved(lse, entropy)
    scale, wanted = Scale(temperature, softcap), Wanted(want_hidden, want_weight)
    return implementation(reference, hidden).backward(slope, hidden, weight, ids, saved, scale, wanted)


@_backward_operator.register_fake
def _backward_shapes(
    grad_logprob: Tensor, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    want_hidden, want_weight = rest[-2:]
    return (
        hidden.new_empty(hidden.shape if want_hidden else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,)),
    )


# -------------------------------------------------------------------------------------------------- autograd
def gradients(
    slope: Slope, hidden: Tensor, weight: Tensor, ids: Tensor, saved: Saved, scale: Scale, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and weight, as `reference.backward`; None for one that is not wanted."""
    both = _backward_operator(*slope, hidden, weight, ids, *saved, *scale, *wanted)
    return both[0] if wanted.hidden else None, both[1] if wanted.weight else None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, ids, *scale = inputs
    _, entropy, lse = output
    ctx.scale = Scale(*scale)
    ctx.set_materialize_grads(False)  # an unused entropy costs nothing in backward
    ctx.save_for_backward(hidden, weight, ids, lse, entropy)


def _backward(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight, ids, lse, entropy = ctx.saved_tensors
    slope = Slope(torch.zeros_like(entropy) if grad_logprob is None else grad_logprob, grad_entropy)
    wanted = Wanted(*ctx.needs_input_grad[:2])
    both = gradients(slope, hidden, weight, ids, Saved(lse, entropy), ctx.scale, wanted)
    return *both, None, None, None


_operator.register_autograd(_backward, setup_context=_setup)


# ---------------------------------------------------------------------------------------------------- public
def check_head(hidden: Tensor, weight: Tensor, ids: Tensor, scale: Scale, validate: bool) -> None:
    """ValueError unless the head's arguments fit each other. Reads values only where `validate` is set."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [T, D] and weight [V, D], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if ids.shape != hidden.shape[:1]:
        raise ValueError(f"expected ids [{hidden.shape[0]}], one a row of hidden, got {list(ids.shape)}")
    if weight.shape[0] == 0:
        raise ValueError("expected a weight with at least one vocabulary row, got none")
    known = [torch.float16, torch.bfloat16, torch.float32]
    if not hidden.is_cuda:
        known.append(torch.float64)
    if hidden.dtype not in known or weight.dtype != hidden.dtype:
        raise ValueError(
            f"expected hidden and weight of one dtype of {known} on {hidden.device.type}, "
            f"got {hidden.dtype} and {weight.dtype}"
        )
    if ids.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"expected integer ids, got {ids.dtype}")
    if weight.device != hidden.device or ids.device != hidden.device:
        devices = f"hidden on {hidden.device}, weight on {weight.device}, ids on {ids.device}"
        raise ValueError(f"expected one device, got {devices}")
    temperature, softcap = scale
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
    scale = Scale.of(temperature, softcap)
    check_head(hidden, weight, ids, scale, validate)
    logprob, entropy, _ = _operator(hidden, weight, ids.long(), *scale)
    return logprob, entropy
