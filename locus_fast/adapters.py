"""LoRA (arXiv 2106.09685) by peft, in place: the model stays the transformers model that `locus_fast.policy` knows, and its language model's linear
layers gain float32 adapters. Nothing else is trained. Over nf4 weights (`locus_fast.quantize`) it is QLoRA.

There is no dropout: the sampler is the policy, so its log-probs must be those of the training forward. With the adapters off the model is the base,
bit for bit, which makes the reference policy free.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from locus_fast.errors import UserError
from locus_fast.files import save_tensors
from locus_fast.libraries import optional
from locus_fast.quantize import PROJECTIONS, language_linears, weight_of

NAME = "default"  # peft's, of the one adapter
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in peft's files


def add_adapters(model: Any, rank: int, alpha: float, targets: Sequence[str] = PROJECTIONS) -> None:
    """Puts float32 adapters of this rank, scaled by alpha / rank, beside each linear layer of the language model that is named in targets, and
    freezes everything else. Their product is 0 at first: the model's outputs are unchanged to the bit. Raises UserError without peft."""
    peft = optional("peft", "--lora")
    where = rf"(.*\.)?language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(targets)})"
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=where, task_type="CAUSAL_LM"), model)
    for parameter in adapter_tensors(model).values():
        parameter.data = parameter.data.float()


def has_adapters(model: Any) -> bool:
    return hasattr(model, "peft_config")


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """The adapters' parameters, by their names in peft's files."""
    return {PREFIX + name.replace(f".{NAME}.", "."): p for name, p in model.named_parameters() if f".{NAME}." in name}


def adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, layer) of each adapted linear layer."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


@contextmanager
def adapters_off(model: Any) -> Iterator[Any]:
    """The base model, as long as the block lasts. Graphs recorded before stay valid if their backward comes after the block."""
    layers = [layer for _, layer in adapted_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class MergedState(Mapping[str, Tensor]):
    """The state of the model without adapters that computes the same: each adapted weight is its base, dequantised if need be, plus the adapters'
    scaled product, float32, computed when it is asked for."""

    def __init__(self, model: Any):
        self.layers = {f"{name}.weight": layer for name, layer in adapted_layers(model)}
        inside = tuple(name.removesuffix("weight") for name in self.layers)
        self.plain = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
        biases = ((name.removesuffix("weight") + "bias", layer.base_layer.bias) for name, layer in self.layers.items())
        self.plain |= {name: bias.detach() for name, bias in biases if bias is not None}

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        if name not in self.layers:
            return self.plain[name]
        layer = self.layers[name]
        return weight_of(layer.base_layer).float() + layer.get_delta_weight(NAME)

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


def write_adapters(model: Any, base: str, folder: Path) -> None:
    """The adapters into the existing folder in peft's own layout. base: the folder or hub id of the model that they belong to."""
    config = copy.copy(model.peft_config[NAME])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    tensors = {name: p.detach().to("cpu").contiguous() for name, p in adapter_tensors(model).items()}
    save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})


@torch.no_grad()
def load_adapters(folder: Path, model: Any) -> None:
    """Puts saved adapters into those of the model. Raises UserError if they are of another rank or of other layers."""
    saved, places = load_file(folder / WEIGHTS), adapter_tensors(model)
    if differing := sorted(saved.keys() ^ places.keys()):
        raise UserError(f"{folder / WEIGHTS} has adapters of other layers: {len(differing)} names differ, the first {differing[0]}.")
    for name, place in places.items():
        if place.shape != saved[name].shape:
            raise UserError(f"{folder / WEIGHTS}: {name} has shape {list(saved[name].shape)}, and the model's {list(place.shape)}.")
        place.copy_(saved[name])


def is_adapter_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """The folder or hub id of the base that saved adapters belong to. Raises UserError if the config names none."""
    base = _config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / CONFIG} does not say which model it adapts: set base_model_name_or_path to the base's folder or hub id.")
    return base


@torch.no_grad()
def merge_adapters(folder: Path, model: Any) -> None:
    """Adds saved adapters to the weights of their base, in place and for good; peft is not needed. Raises UserError for adapters that are not plain
    LoRA of the language model's linear layers."""
    config = _config(folder)
    try:
        tensors, rank, alpha = load_file(folder / WEIGHTS), int(config["r"]), float(config["lora_alpha"])
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} does not hold whole adapters ({type(error).__name__}): {CONFIG} with r and lora_alpha, and {WEIGHTS}.") from None
    names = {id(module): name for name, module in model.named_modules()}
    for _, _, linear in language_linears(model):
        pair = [f"{PREFIX}{names[id(linear)]}.lora_{side}.weight" for side in "BA"]
        if tensors.keys() >= set(pair):
            up, down = (tensors.pop(name).to(linear.weight.device, torch.float32) for name in pair)
            linear.weight.copy_(linear.weight.float() + up @ down * (alpha / rank))
    if tensors or any(config.get(key) for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")):
        what = f"the first {min(tensors)}" if tensors else "a variant of LoRA"
        raise UserError(f"{folder} holds more than plain LoRA of the language model's linear layers, {what}: merge it with peft first.")


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / CONFIG).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read as the config of an adapter ({type(error).__name__}).") from None
