"""From summed gradients to moved weights: what is trained at which rate, the schedule, the optimizers, and a step that never waits for the device.

A bfloat16 weight of 0.02 has neighbours 1.2e-4 apart, so a plain step of 1e-6 is rounded away. Two optimizers keep it: stochastic rounding (right on
average, nothing more to store) and float32 master weights (exact, 4 bytes a parameter more). Bytes a parameter of weight and states together:
adamw on float32 12, adamw-master on bfloat16 14, adamw8bit on bfloat16 4.

Every optimizer makes its whole state when it is made: a run that does not fit says so before its first step, and a checkpoint has a place to go to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from locus_kernels.adamw8bit import adamw8bit_, from_dynamic_codes, new_state
from torch import Tensor
from torch.optim.adamw import adamw

from locus_fast.errors import UserError
from locus_fast.run.libraries import optional

PARTS = ("vision", "projector", "language")
SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("auto", "adamw", "adamw8bit", "adamw-master", "bnb-adamw8bit", "bnb-paged-adamw8bit")
INSTALL = "'locus-fast[optim]'"  # what has the libraries of the last three


def part_of(name: str) -> str:
    """The part that a parameter of a Qwen-VL model belongs to, by its name, which may have a prefix (adapters wrap the model)."""
    words = name.split(".")
    if "visual" not in words:
        return "language"
    return "projector" if "merger" in words or "deepstack_merger_list" in words else "vision"


def parameter_groups(model: torch.nn.Module, rates: dict[str, float]) -> list[dict[str, Any]]:
    """The trainable parameters as optimizer groups {"part", "params", "rate"}, at most one for each part; tied weights are in one group, once.

    rates: the learning rate of each of PARTS. A part with rate 0 is frozen: its `requires_grad` is switched off, so it gets no gradient and no state.
    Raises UserError if nothing is left to train.
    """
    groups: dict[str, dict[str, Any]] = {part: {"part": part, "params": [], "rate": rates[part]} for part in PARTS}
    for name, parameter in model.named_parameters():
        group = groups[part_of(name)]
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

    It rises in equal parts over the first `warmup` share of the steps, the last of which has 1; then it stays (constant), or falls along half a
    cosine that would be 0 in the step after the last (cosine).
    """
    rising = max(1.0, warmup * steps)
    factor = min(1.0, (step + 1) / rising)
    if schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * max(0.0, step + 1 - rising) / (steps + 1 - rising)))
    return factor


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on float32 copies of the weights: each step ends with the weight as its copy rounded to nearest. One tensor at a time, so that only one
    gradient is in float32. State of each parameter: master, exp_avg, exp_avg_sq (float32), step."""

    def __init__(self, groups: list[dict[str, Any]], weight_decay: float) -> None:
        super().__init__(groups, {"weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                adamw(
                    [state["master"]],
                    [p.grad.float()],
                    [state["exp_avg"]],
                    [state["exp_avg_sq"]],
                    [],
                    [state["step"]],
                    fused=True,
                    amsgrad=False,
                    maximize=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                )
                p.copy_(state["master"])


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments of 8 bits, whose steps stay those of float32 AdamW: see `locus_kernels.adamw8bit`.

    Gradients are scaled as they are read, and bfloat16 weights rounded stochastically: by the seed of a step, the
    parameter's number and the element alone.
    """

    def __init__(self, groups: list[dict[str, Any]], weight_decay: float) -> None:
        super().__init__(groups, {"weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8})
        self.gradient_scale: Tensor | None = None  # float32 [], of the next step; None for 1
        self.seed = 0  # of the next step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        scale = self.gradient_scale
        number = 0
        for group in self.param_groups:
            numbers = range(number, number + len(group["params"]))
            number += len(group["params"])
            moved = [(i, p) for i, p in zip(numbers, group["params"], strict=True) if p.grad is not None]
            adamw8bit_(
                [p for _, p in moved],
                [p.grad for _, p in moved],
                [self.state[p] for _, p in moved],
                lr=[group["lr"]] * len(moved),
                gradient_scale=torch.ones((), device=group["lr"].device) if scale is None else scale,
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                seed=self.seed,
                streams=[i for i, _ in moved],
            )


def default_optimizer(name: str, dtype: torch.dtype) -> str:
    """The optimizer that "auto" stands for with weights of that type; any other name is itself."""
    return name if name != "auto" else "adamw" if dtype == torch.float32 else "adamw8bit"


def make_optimizer(name: str, groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer of that name, one of OPTIMIZERS, over groups as `parameter_groups` makes them. Betas 0.9 and 0.999, eps 1e-8, decay on all.

    - auto: adamw8bit if a weight is bfloat16, else adamw.
    - adamw: torch's fused AdamW, for float32 weights.
    - adamw8bit: states of 8 bits in blocks of 256, float32 for tensors without such blocks; bfloat16 weights are
      rounded stochastically.
    - adamw-master: for bfloat16 weights, with float32 copies of them.
    - bnb-adamw8bit, bnb-paged-adamw8bit: bitsandbytes', for the float32 adapters of LoRA; paged moves states to the host when the device is full.
    Raises UserError for a name that is none of these, a library that is missing, or bfloat16 weights that the optimizer would not move.
    """
    parameters = [p for group in groups for p in group["params"]]
    low = any(p.dtype != torch.float32 for p in parameters)
    name = default_optimizer(name, torch.bfloat16 if low else torch.float32)
    if name not in OPTIMIZERS:
        raise UserError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, not '{name}'.")
    if low and name not in ("adamw8bit", "adamw-master"):
        raise UserError(f"--optimizer {name} rounds small steps of bfloat16 weights away: use adamw8bit or adamw-master, or float32 weights.")
    if name.startswith("bnb-"):
        library = optional("bitsandbytes.optim", f"--optimizer {name}", INSTALL)
        make = library.PagedAdamW8bit if "paged" in name else library.AdamW8bit
        optimizer = make([{**group, "lr": float(group["rate"])} for group in groups], weight_decay=weight_decay)
    else:
        device = parameters[0].device
        groups = [{**group, "lr": torch.full((), group["rate"], dtype=torch.float32, device=device)} for group in groups]
        if name == "adamw":
            optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
        elif name == "adamw-master":
            optimizer = MasterAdamW(groups, weight_decay)
        else:
            optimizer = AdamW8bit(groups, weight_decay)
    make_state(optimizer)
    return optimizer


@torch.no_grad()
def make_state(optimizer: torch.optim.Optimizer) -> None:
    """The state of every parameter as it is before the first step."""
    for number, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            if hasattr(optimizer, "init_state"):  # bitsandbytes
                optimizer.init_state(group, p, number, index)
                continue
            state = optimizer.state[p]
            if isinstance(optimizer, AdamW8bit):
                state.update(new_state(p))
                continue
            state["step"] = torch.zeros((), device=p.device)
            if isinstance(optimizer, MasterAdamW):
                state["master"] = p.detach().float().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(p, dtype=torch.float32)


@torch.no_grad()
def clip_and_step(optimizer: torch.optim.Optimizer, *, denominator: float | Tensor, factor: float, clip: float, seed: int) -> Tensor:
    """Divides the summed gradients by `denominator`, clips their global norm to `clip` and steps, at `factor` times
    each group's rate.

    Returns the norm before clipping, float32 []: 0 if no parameter has a gradient, and then nothing is done. If it is
    not finite, the step is one with gradients of 0 and rates of 0: no weight moves, moments decay. Nothing is read
    back from the device, except with bitsandbytes, whose rates are numbers on the host: there such a step is left
    out. The gradients are overwritten, but for adamw8bit, which scales them as it reads them. Stochastic rounding
    draws from `seed` alone, which should differ from update to update; the global generators are left as they were.
    A torch.OutOfMemoryError comes before anything was changed.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(norms)) / denominator
    finite = norm.isfinite()
    scale = (clip / norm.clamp(min=1e-12)).clamp(max=1.0) / denominator
    scale = torch.where(finite, scale, 0.0).float()
    if isinstance(optimizer, AdamW8bit):
        optimizer.gradient_scale, optimizer.seed = scale, seed
    else:
        reserve(gradients)
        spoiled = ~finite
        torch._foreach_mul_(gradients, scale)
        for gradient in gradients:
            gradient.masked_fill_(spoiled, 0.0)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["rate"] * factor).mul_(finite)
        elif finite:
            group["lr"] = group["rate"] * factor
        else:
            return norm
    optimizer.step()
    return norm


def reserve(gradients: list[Tensor]) -> None:
    """Asks the allocator for what a step needs besides what is there, and gives it back: a float32 copy of the
    largest tensor below float32. A step that does not fit so raises torch.OutOfMemoryError while nothing has moved."""
    low = max((gradient.numel() for gradient in gradients if gradient.dtype != torch.float32), default=0)
    torch.empty(low, dtype=torch.float32, device=gradients[0].device)


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], str, str, Any]]:
    """(a parameter's state, key, name in a checkpoint, value) of the whole state but tables of constants."""
    if not optimizer.state:
        make_state(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in enumerate(parameters):
        for key, value in optimizer.state[p].items():
            if not key.startswith("qmap"):
                yield optimizer.state[p], key, f"{index}.{key}", value


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as plain tensors by name; `load_state_tensors` takes them back. Rates and settings are
    not in it."""
    return {name: torch.as_tensor(value).contiguous() for _, _, name, value in _state_tensors(optimizer)}


def _from_dynamic_codes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A saved state with the 8-bit moments of earlier versions, N.exp_avg.codes and so on, in today's form."""
    old = {name.removesuffix(".exp_avg.codes") for name in tensors if name.endswith(".exp_avg.codes")}
    kept = {name: value for name, value in tensors.items() if not name.endswith((".codes", ".scale"))}
    for index in old:
        moments = ("exp_avg", "exp_avg_sq")
        first, second = ((tensors[f"{index}.{key}.codes"], tensors[f"{index}.{key}.scale"]) for key in moments)
        kept |= {f"{index}.{key}": value for key, value in from_dynamic_codes(first, second).items()}
    return kept


@torch.no_grad()
def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts a saved state in place. Raises ValueError if it is another optimizer's: names, shapes or dtypes that
    differ."""
    if isinstance(optimizer, AdamW8bit):
        tensors = _from_dynamic_codes(tensors)
    places = list(_state_tensors(optimizer))
    if differing := {name for _, _, name, _ in places} ^ tensors.keys():
        what = f"{len(differing)} tensors, the first {min(differing)}"
        raise ValueError(f"the optimizer's state is of another optimizer or other parameters: {what}")
    for state, key, name, value in places:
        saved = tensors[name]
        if not isinstance(value, Tensor):
            state[key] = saved.item()
        elif value.shape != saved.shape or value.dtype != saved.dtype:
            expected, came = (f"{t.dtype} {list(t.shape)}" for t in (value, saved))
            raise ValueError(f"the optimizer's state {name}: expected {expected}, got {came}")
        else:
            value.copy_(saved)
