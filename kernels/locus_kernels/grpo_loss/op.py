"""`grpo_loss`: registration with PyTorch, so that it differentiates and survives `torch.compile`, and the
public function.

CPU tensors take `reference.py`, CUDA tensors `triton.py`, which raises where it cannot run. Backward is
`linear_logprob`'s, with the objective's derivative as the gradient of each log-prob. Legend: T tokens, V
vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from locus_kernels.grpo_loss import reference
from locus_kernels.linear_logprob.op import check_head, gradients
from locus_kernels.linear_logprob.reference import compute_dtype


def backend(tensor: Tensor) -> ModuleType:
    """The module whose `forward` runs on this tensor's device. Triton is imported on first use: CPU machines
    need not have it."""
    if tensor.is_cuda:
        from locus_kernels.grpo_loss import triton as kernels

        return kernels
    return reference


@torch.library.custom_op("locus_kernels::grpo_loss", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    advantages: Tensor,
    old_logprob: Tensor | None,
    reference_logprob: Tensor | None,
    token_weight: Tensor | None,
    numbers: list[float],
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    vectors = (advantages, old_logprob, reference_logprob, token_weight)
    return backend(hidden).forward(
        hidden, weight, ids, *vectors, reference.Numbers(*numbers), temperature, softcap
    )


@_forward.register_fake
def _(
    hidden,
    weight,
    ids,
    advantages,
    old_logprob,
    reference_logprob,
    token_weight,
    numbers,
    temperature,
    softcap,
):
    T, dtype = hidden.shape[0], compute_dtype(hidden.dtype)
    loss, logprob, entropy, slope, metrics = (
        hidden.new_empty(s, dtype=dtype) for s in ((), (T,), (T,), (T,), (len(reference.METRICS),))
    )
    return loss, logprob, hidden.new_empty(T, dtype=torch.float64), entropy, slope, metrics


def _setup(ctx, inputs, output) -> None:
    hidden, weight, ids = inputs[:3]
    ctx.temperature, ctx.softcap = inputs[-2:]
    _, _, lse, entropy, slope, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, ids, lse, entropy, slope)


def _backward(ctx, grad_loss: Tensor | None, grad_logprob: Tensor | None, *_: Tensor | None):
    hidden, weight, ids, lse, entropy, slope = ctx.saved_tensors
    g = torch.zeros_like(slope) if grad_loss is None else grad_loss * slope
    if grad_logprob is not None:
        g = g + grad_logprob
    wanted = ctx.needs_input_grad[:2]
    both = gradients(g, None, hidden, weight, ids, lse, entropy, ctx.temperature, ctx.softcap, *wanted)
    return *(gradient if want else None for gradient, want in zip(both, wanted, strict=True)), *[None] * 8


_forward.register_autograd(_backward, setup_context=_setup)


def grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    advantages: Tensor,
    old_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    token_weight: Tensor | None = None,
    *,
    clip_low: float,
    clip_high: float,
    kl_coefficient: float,
    log_ratio_clamp: float = math.inf,
    kl_clamp: float = math.inf,
    temperature: float = 1.0,
    softcap: float | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The summed GRPO loss of T tokens straight from hidden states, without a [T, V] tensor; divide it by the
    batch's denominator.

    hidden [T, D], weight [V, D], ids [T], temperature, softcap, validate: as in `linear_logprob`. All others
    floating [T], without gradient: advantages; old_logprob, of the policy that sampled (None: this one, so
    the ratio is 1 and the gradient the plain policy gradient's); reference_logprob, for the k3 estimate of
    KL(policy || reference), times kl_coefficient >= 0 (None: no such term); token_weight (None: 1).
    The ratio is clipped to [1 - clip_low, 1 + clip_high], both >= 0. log_ratio_clamp > 0 bounds the magnitude
    of both log-ratios before they are exponentiated, and kl_clamp > 0 a token's k3: a token past a bound has
    no gradient through it. EasyR1 has 20 and 10.

    Returns (loss, a scalar; log-prob [T]; metrics), float32 (float64 for float64), all on the device, nothing
    synchronised. Loss and log-prob are differentiable in hidden and weight, once; in backward, tiles of
    tokens whose gradient is 0 are not computed again.
    Metrics are 0-d, over all T tokens whatever their weight: clip_low and clip_high (tokens where a bound
    stopped the gradient), kl and entropy (sums in nats), ratio_clamped and kl_clamped (tokens past
    log_ratio_clamp, or past one of the two bounds of k3), ratio_max and ratio_min (both 0 without tokens).
    ValueError on what does not fit, as in `linear_logprob`.
    """
    check_head(hidden, weight, ids, temperature, softcap, validate)
    vectors = {
        "advantages": advantages,
        "old_logprob": old_logprob,
        "reference_logprob": reference_logprob,
        "token_weight": token_weight,
    }
    for name, vector in vectors.items():
        if vector is None and name != "advantages":
            continue
        if (
            vector is None
            or vector.shape != ids.shape
            or not vector.is_floating_point()
            or vector.device != hidden.device
        ):
            got = "None" if vector is None else f"{vector.dtype} {list(vector.shape)} on {vector.device}"
            raise ValueError(f"expected {name} floating [{len(ids)}] on {hidden.device}, got {got}")
    numbers = {"clip_low": clip_low, "clip_high": clip_high, "kl_coefficient": kl_coefficient}
    for name, number in numbers.items():
        if not (number >= 0 and math.isfinite(number)):
            raise ValueError(f"expected a finite {name} of at least 0, got {number}")
    clamps = {"log_ratio_clamp": log_ratio_clamp, "kl_clamp": kl_clamp}
    for name, number in clamps.items():
        if not number > 0:
            raise ValueError(f"expected {name} above 0, or infinite for none, got {number}")
    detached = [vector if vector is None else vector.detach() for vector in vectors.values()]
    constants = [float(number) for number in (*numbers.values(), *clamps.values())]
    cap = None if softcap is None else float(softcap)
    loss, logprob, _, _, _, metrics = _forward(
        hidden, weight, ids.long(), *detached, constants, float(temperature), cap
    )
    return loss, logprob, dict(zip(reference.METRICS, metrics.detach().unbind(), strict=True))
