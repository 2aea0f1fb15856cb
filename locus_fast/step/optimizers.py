"""The optimizers, and their state as plain tensors.

A bfloat16 weight of 0.02 has neighbours 1.2e-4 apart, so a plain step of 1e-6 is rounded away. Two optimizers
keep it: stochastic rounding (right on average, nothing more to store) and float32 master weights (exact, 4
bytes a parameter more). Bytes a parameter of weight and states together: adamw on float32 12, adamw-master on
bfloat16 14, adamw8bit on bfloat16 4.

Every optimizer makes its whole state when it is made: a run that does not fit says so before its first step,
and a checkpoint has a place to go to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from locus_kernels.adamw8bit import adamw8bit_, from_dynamic_codes, new_state
from torch import Tensor
from torch.optim.adamw import adamw

from locus_fast.config.settings import OPTIMIZERS
from locus_fast.errors import UserError
from locus_fast.libraries import optional

INSTALL = "'locus-fast[optim]'"


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on float32 copies of the weights: each step ends with the weight as its copy rounded to nearest.
    One tensor at a time, so that only one gradient is in float32. State of each parameter: master, exp_avg,
    exp_avg_sq (float32), step."""

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

    Gradients are scaled as they are read, and bfloat16 weights rounded stochastically: by the seed of a step,
    the parameter's number and the element alone.
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
    """The optimizer of that name, one of OPTIMIZERS, over groups as `parameter_groups` makes them. Betas 0.9
    and 0.999, eps 1e-8, decay on all.

    - auto: adamw8bit if a weight is bfloat16, else adamw.
    - adamw: torch's fused AdamW, for float32 weights.
    - adamw8bit: states of 8 bits in blocks of 256, float32 for tensors without such blocks; bfloat16 weights
      are rounded stochastically.
    - adamw-master: for bfloat16 weights, with float32 copies of them.
    - bnb-adamw8bit, bnb-paged-adamw8bit: bitsandbytes', for the float32 adapters of LoRA; paged moves states
    to the host when the device is full. Raises UserError for a name that is none of these, a library that is
    missing, or bfloat16 weights that the optimizer would not move.
    """
    parameters = [p for group in groups for p in group["params"]]
    low = any(p.dtype != torch.float32 for p in parameters)
    name = default_optimizer(name, torch.bfloat16 if low else torch.float32)
    if name not in OPTIMIZERS:
        raise UserError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, not '{name}'.")
    if low and name not in ("adamw8bit", "adamw-master"):
        raise UserError(
            f"--optimizer {name} rounds small steps of bfloat16 weights away: use adamw8bit or "
            "adamw-master, or float32 weights."
        )
    if name.startswith("bnb-"):
        library = optional("bitsandbytes.optim", f"--optimizer {name}", INSTALL)
        make = library.PagedAdamW8bit if "paged" in name else library.AdamW8bit
        optimizer = make(
            [{**group, "lr": float(group["rate"])} for group in groups], weight_decay=weight_decay
        )
    else:
        device = parameters[0].device
        groups = [
            {**group, "lr": torch.full((), group["rate"], dtype=torch.float32, device=device)}
            for group in groups
        ]
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
    """The optimizer's state as plain tensors by name; `load_state_tensors` takes them back. Rates and
    settings are not in it."""
    return {name: torch.as_tensor(value).contiguous() for _, _, name, value in _state_tensors(optimizer)}


def _from_dynamic_codes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A saved state with the 8-bit moments of earlier versions, N.exp_avg.codes and so on, in today's
    form."""
    old = {name.removesuffix(".exp_avg.codes") for name in tensors if name.endswith(".exp_avg.codes")}
    kept = {name: value for name, value in tensors.items() if not name.endswith((".codes", ".scale"))}
    for index in old:
        moments = ("exp_avg", "exp_avg_sq")
        first, second = (
            (tensors[f"{index}.{key}.codes"], tensors[f"{index}.{key}.scale"]) for key in moments
        )
        kept |= {f"{index}.{key}": value for key, value in from_dynamic_codes(first, second).items()}
    return kept


@torch.no_grad()
def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts a saved state in place. Raises ValueError if it is another optimizer's: names, shapes or dtypes
    that differ."""
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
