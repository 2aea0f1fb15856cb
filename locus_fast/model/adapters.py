"""LoRA (arXiv 2106.09685) by peft, in place: the model stays the transformers model that
`locus_fast.model.policy` knows, and its language model's linear layers gain float32 adapters. Nothing else is
trained. Over nf4 weights (`locus_fast.model.quantize`) it is QLoRA.

There is no dropout: the sampler is the policy, so its log-probs must be those of the training forward.

A model that already has adapters can be trained in three ways:

- they are trained further, from where they are (`train_further`);
- they stay as they are, counted in, and new ones are trained beside them (`keep_adapters`, `add_adapters`);
- they are added to the weights for good (`merge_adapters`), which are then trained like any.

In the first two the trained adapters are called NAME and frozen ones GIVEN. With NAME off the model is what
it was given as, bit for bit, which makes the reference policy free.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from locus_fast.errors import UserError
from locus_fast.libraries import optional
from locus_fast.model.adapter_files import (
    LAYERS,
    PREFIX,
    WEIGHTS,
    Pair,
    joined,
    named_tensors,
    peft_config,
    write_pairs,
)
from locus_fast.model.quantize import PROJECTIONS, language_linears, linear_names, weight_of

NAME = "default"  # of the adapters that are trained; peft's name of an only one
GIVEN = "given"  # of those that stay as they were given


def add_adapters(model: Any, rank: int, alpha: float, targets: Sequence[str] = PROJECTIONS) -> None:
    """Puts float32 adapters of this rank, scaled by alpha / rank, beside each linear layer of the language
    model that is named in targets, and freezes everything else. Their product is 0 at first: the model's
    outputs are unchanged to the bit. Raises UserError without peft."""
    peft = optional("peft", "--lora")
    where = LAYERS.format(kinds="|".join(targets))
    _inject(
        model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=where, task_type="CAUSAL_LM"), NAME
    )
    _activate(model, [GIVEN, NAME] if _holds(model, GIVEN) else [NAME])


def keep_adapters(model: Any, pairs: Mapping[str, Pair]) -> None:
    """Puts saved adapters in place, frozen; `add_adapters` may follow. Raises UserError without peft."""
    _put(model, pairs, GIVEN)
    _activate(model, [GIVEN])


def train_further(model: Any, pairs: Mapping[str, Pair], anchored: bool) -> None:
    """Puts saved adapters in place to be trained, and freezes everything else. anchored: a second, frozen
    copy of them stays as the reference policy. Raises UserError without peft."""
    _put(model, pairs, NAME)
    if anchored:
        _put(model, pairs, GIVEN)
    _activate(model, [NAME])


@torch.no_grad()
def merge_adapters(pairs: Mapping[str, Pair], model: Any) -> None:
    """Adds saved adapters to the weights of their base, in place and for good; peft is not needed."""
    names = linear_names(model)
    for _, _, linear in language_linears(model):
        if pair := pairs.get(names[id(linear)]):
            up, down = (tensor.to(linear.weight.device) for tensor in (pair.up, pair.down))
            linear.weight.copy_(linear.weight.float() + up @ down * pair.scale)


@torch.no_grad()
def _put(model: Any, pairs: Mapping[str, Pair], name: str) -> None:
    scales = {layer: (pair.rank, pair.scale) for layer, pair in pairs.items()}
    _inject(model, peft_config(scales, None, dict.fromkeys(linear_names(model).values())), name)
    for layer, module in adapted_layers(model):
        if pair := pairs.get(layer):
            module.lora_A[name].weight.copy_(pair.down)
            module.lora_B[name].weight.copy_(pair.up)
            module.scaling[name] = pair.scale


def _inject(model: Any, config: Any, name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        optional("peft", "--lora").inject_adapter_in_model(config, model, adapter_name=name)
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data = parameter.data.float()


def has_adapters(model: Any) -> bool:
    return hasattr(model, "peft_config")


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """The parameters of the trained adapters, by their names in peft's files."""
    return {
        PREFIX + name.replace(f".{NAME}.", "."): p
        for name, p in model.named_parameters()
        if f".{NAME}." in name
    }


def adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, layer) of each adapted linear layer."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def _holds(model: Any, name: str) -> bool:
    return any(name in layer.lora_A for _, layer in adapted_layers(model))


def _activate(model: Any, names: Sequence[str]) -> None:
    """Lets these adapters count, and no others; those called NAME take a gradient if they are among them."""
    for _, layer in adapted_layers(model):
        layer.enable_adapters(bool(names))
        if names:
            layer.set_adapter(list(names))
        if GIVEN in layer.lora_A:
            for half in (layer.lora_A, layer.lora_B):
                half[GIVEN].requires_grad_(False)


@contextmanager
def adapters_off(model: Any) -> Iterator[Any]:
    """The model as it was given, as long as the block lasts: without the trained adapters, and with those
    that it came with. Graphs recorded before stay valid if their backward comes after the block."""
    active = next(layer.active_adapters for _, layer in adapted_layers(model))
    _activate(model, [GIVEN] if _holds(model, GIVEN) else [])
    try:
        yield model
    finally:
        _activate(model, active)


class MergedState(Mapping[str, Tensor]):
    """The state of the model without adapters that computes the same: each adapted weight is its base,
    dequantised if need be, plus the scaled products of the adapters that count, float32, computed when it is
    asked for."""

    def __init__(self, model: Any):
        self.layers = {f"{name}.weight": layer for name, layer in adapted_layers(model)}
        inside = tuple(name.removesuffix("weight") for name in self.layers)
        self.plain = {
            name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)
        }
        biases = (
            (name.removesuffix("weight") + "bias", layer.base_layer.bias)
            for name, layer in self.layers.items()
        )
        self.plain |= {name: bias.detach() for name, bias in biases if bias is not None}

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        if name not in self.layers:
            return self.plain[name]
        layer = self.layers[name]
        return weight_of(layer.base_layer).float() + sum(
            layer.get_delta_weight(each) for each in _counted(layer)
        )

    def __contains__(self, name: object) -> bool:
        return name in self.layers or name in self.plain

    def __iter__(self) -> Iterator[str]:
        yield from self.layers
        yield from self.plain

    def __len__(self) -> int:
        return len(self.layers) + len(self.plain)


def merged_state(model: Any) -> Mapping[str, Tensor]:
    """The model's state by the names of its source: its own, or where it has adapters the merged one."""
    return MergedState(model) if has_adapters(model) else model.state_dict()


def _counted(layer: Any) -> list[str]:
    """The names of the adapters of a layer that count."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


@torch.no_grad()
def pairs_of(model: Any) -> dict[str, Pair]:
    """What the adapters compute, as one pair a layer: the trained ones, and before them along the rank those
    that are kept beneath."""
    pairs = {}
    for name, layer in adapted_layers(model):
        down, up, scale = layer.lora_A, layer.lora_B, layer.scaling
        pairs[name] = joined(
            [Pair(down[each].weight, up[each].weight, scale[each]) for each in _counted(layer)]
        )
    return pairs


def write_adapters(model: Any, base: str, folder: Path) -> None:
    """What the adapters compute as one adapter, into the existing folder in peft's own layout. base: the
    folder or hub id of the model that it belongs to."""
    write_pairs(pairs_of(model), base, folder, dict.fromkeys(linear_names(model).values()))


@torch.no_grad()
def load_adapters(folder: Path, model: Any) -> None:
    """Puts adapters that `write_adapters` saved into the trained ones of the model, to the bit. Raises
    UserError if they are of another rank or of other layers, or were saved over other adapters than those
    that are kept."""
    saved, now = load_file(folder / WEIGHTS), dict(named_tensors(pairs_of(model)))
    if differing := sorted(saved.keys() ^ now.keys()):
        what = f"{len(differing)} names differ, the first {differing[0]}"
        raise UserError(f"{folder / WEIGHTS} has adapters of other layers: {what}.")
    for name, place in adapter_tensors(model).items():
        if now[name].shape != saved[name].shape:
            shapes = f"has shape {list(saved[name].shape)}, and the model's {list(now[name].shape)}"
            raise UserError(f"{folder / WEIGHTS}: {name} {shapes}.")
        along = int(".lora_B." in name)  # the dimension of the rank: lora_A is [rank, in], lora_B [out, rank]
        kept = now[name].shape[along] - place.shape[along]
        beneath, trained = saved[name].split([kept, place.shape[along]], along)
        if not torch.allclose(beneath, now[name].narrow(along, 0, kept), rtol=1e-5, atol=0):
            what = "was saved over other adapters than --model holds now"
            raise UserError(f"{folder / WEIGHTS}: {name} {what}: give back those of the run.")
        place.copy_(trained)
