"""`grpo_loss`: registration with PyTorch, so that it differentiates and survives `torch.compile`, and the
public function.

Backward is `linear_logprob`'s, with the objective's derivative as the gradient of each log-prob.

Legend: T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from locus_kernels.dispatch import implementation
from locus_kernels.grpo_loss import reference
from locus_kernels.grpo_loss.reference import Numbers, Tokens
from locus_kernels.linear_logprob.op import check_head, gradients
from locus_kernels.linear_logprob.records import Saved, Scale, Slope, Wanted
from locus_kernels.linear_logprob.reference import compute_dtype


# -------------------------------------------------------------------------------------------------- operator
@torch.library.custom_op("locus_kernels::grpo_loss", mutates_args=())
def _operator(
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
    tokens = Tokens(advantages, old_logprob, reference_logprob, token_weight)
    inputs = (hidden, weight, ids, tokens, Numbers(*numbers), Scale(temperature, softcap))
    return tuple(implementation(reference, hidden).forward(*inputs))


@_operator.register_fake
def _shapes(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, dtype = hidden.shape[0], compute_dtype(hidden.dtype)
    loss, metrics = (hidden.new_empty(shape, dtype=dtype) for shape in ((), (len(reference.METRICS),)))
    logprob, entropy, slope = (hidden.new_empty(T, dtype=dtype) for _ in range(3))
    return loss, logprob, hidden.new_empty(T, dtype=torch.float64), entropy, slope, metrics


# -------------------------------------------------------------------------------------------------- autograd
def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, ids = inputs[:3]
    _, _, lse, entropy, slope, _ = output
    ctx.scale = Scale(*inputs[-2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, ids, lse, entropy, slope)


def _backward(
    ctx: Any, grad_loss: Tensor | None, grad_logprob: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight, ids, lse, entropy, slope = ctx.saved_tensors
    g = torch.zeros_like(slope) if grad_loss is None else grad_loss * slope
    if grad_logprob is not None:
        g = g + grad_logprob
    wanted = Wanted(*ctx.needs_input_grad[:2])
    both = gradients(Slope(g, None), hidden, weight, ids, Saved(lse, entropy), ctx.scale, wanted)
    return *both, *[None] * 8


_operator.register_autograd(_backward, setup_context=_setup)


# ---------------------------------------------------------------------------------------------------- public
def _check(hidden: Tensor, ids: Tensor, tokens: Tokens, numbers: Numbers) -> None:
    for name, vector in tokens._asdict().items():
        if vector is None and name != "advantages":
            continue
        floating = vector is not None and vector.is_floating_point()
        if vector is None or vector.shape != ids.shape or not floating or vector.device != hidden.device:
            got = "None" if vector is None else f"{vector.dtype} {list(vector.shape)} on {vector.device}"
            raise ValueError(f"expected {name} floating [{len(ids)}] on {hidden.device}, got {got}")
    for name in ("clip_low", "clip_high", "kl_coefficient"):
        number = getattr(numbers, name)
        if not (number >= 0 and math.isfinite(number)):
            raise ValueError(f"expected a finite {name} of at least 0, got {number}")
    for name in ("log_ratio_clamp", "kl_clamp"):
        number = getattr(numbers, name)
        if not number > 0:
            raise ValueError(f"expected {name} above 0, or infinite for none, got {number}")


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
    scale = Scale.of(temperature, softcap)
    check_head(hidden, weight, ids, scale, validate)
    tokens = Tokens(advantages, old_logprob, reference_logprob, token_weight)
    numbers = Numbers(clip_low, clip_high, kl_coefficient, log_ratio_clamp, kl_clamp)
    _check(hidden, ids, tokens, numbers)
    vectors = (t if t is None else t.detach() for t in tokens)
    flat = [float(number) for number in numbers]
    loss, logprob, *_, metrics = _operator(hidden, weight, ids.long(), *vectors, flat, *scale)
    return loss, logprob, dict(zip(reference.METRICS, metrics.detach().unbind(), strict=True))
