"""From summed gradients to moved weights: what is trained at which rate, the schedule, and a step that never
waits for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from locus_fast.config import Config
from locus_fast.errors import UserError
from locus_fast.model.families import PARTS, family_of, part_of
from locus_fast.step.optimizers import AdamW8bit, make_optimizer


def optimizer_of(config: Config, model: Any) -> torch.optim.Optimizer:
    """A run's optimizer, new: each part at its share of the rate. Raises UserError as `make_optimizer`
    does."""
    rates = {part: config.lr * share for part, share in zip(PARTS, config.lr_scale, strict=True)}
    return make_optimizer(config.optimizer, parameter_groups(model, rates), config.weight_decay)


def parameter_groups(model: Any, rates: dict[str, float]) -> list[dict[str, Any]]:
    """The trainable parameters as optimizer groups {"part", "params", "rate"}, at most one for each part;
    tied weights are in one group, once.

    rates: the learning rate of each of `model.families.PARTS`. A part with a rate of 0 is frozen: its
    `requires_grad` is switched off, so it gets no gradient and no state. Raises UserError if nothing is left
    to train.
    """
    family = family_of(model.config)
    groups: dict[str, dict[str, Any]] = {
        part: {"part": part, "params": [], "rate": rates[part]} for part in PARTS
    }
    for name, parameter in model.named_parameters():
        group = groups[part_of(name, family)]
        if group["rate"] == 0:
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            group["params"].append(parameter)
    kept = [group for group in groups.values() if group["params"]]
    if not kept:
        raise UserError(f"nothing is left to train: give one of {', '.join(PARTS)} a learning rate above 0.")
    return kept


def rate_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """What the learning rates are multiplied with in step `step` (from 0) of `steps`, in (0, 1].

    It rises in equal parts over the first `warmup` share of the steps, the last of which has 1; then it stays
    (constant), or falls along half a cosine that would be 0 in the step after the last (cosine).
    """
    rising = max(1.0, warmup * steps)
    factor = min(1.0, (step + 1) / rising)
    if schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * max(0.0, step + 1 - rising) / (steps + 1 - rising)))
    return factor


@torch.no_grad()
def clip_and_step(
    optimizer: torch.optim.Optimizer,
    *,
    denominator: float,
    factor: float,
    clip: float,
    seed: int,
    usable: Tensor | None = None,
) -> Tensor:
    """Divides the summed gradients by `denominator`, clips their global norm to `clip` and steps, at `factor`
    times each group's rate.

    Returns the norm before clipping, float32 []: 0 if no parameter has a gradient, and then nothing is done.
    If it is not finite, or if `usable`, bool [], is false, the step is one with gradients of 0 and rates of
    0: no weight moves, moments decay. Nothing is read back from the device, except with bitsandbytes, whose
    rates are numbers on the host: there such a step is left out. The gradients are overwritten, but for
    adamw8bit, which scales them as it reads them. Stochastic rounding draws from `seed` alone, which should
    differ from update to update; the global generators are left as they were. A torch.OutOfMemoryError comes
    before anything was changed.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(norms)) / denominator
    good = norm.isfinite() if usable is None else norm.isfinite() & usable
    scale = (clip / norm.clamp(min=1e-12)).clamp(max=1.0) / denominator
    scale = torch.where(good, scale, 0.0).float()
    if isinstance(optimizer, AdamW8bit):
        optimizer.gradient_scale, optimizer.seed = scale, seed
    else:
        reserve(gradients)
        torch._foreach_mul_(gradients, scale)
        for gradient in gradients:
            gradient.masked_fill_(~good, 0.0)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["rate"] * factor).mul_(good)
        elif good:
            group["lr"] = group["rate"] * factor
        else:
            return norm
    optimizer.step()
    return norm


def reserve(gradients: list[Tensor]) -> None:
    """Asks the allocator for what a step needs besides what is there, and gives it back: a float32 copy of
    the largest tensor below float32. A step that does not fit so raises torch.OutOfMemoryError while nothing
    has moved."""
    low = max((gradient.numel() for gradient in gradients if gradient.dtype != torch.float32), default=0)
    torch.empty(low, dtype=torch.float32, device=gradients[0].device)
