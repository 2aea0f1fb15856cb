"""Saved adapters in peft's layout: read and judged without peft, and written so that plain peft loads them.

What is computed from a config: LoRA (arXiv 2106.09685) of the language model's linear layers, a layer's product scaled
by alpha / rank, or by alpha / sqrt(rank) where it is rank-stabilised (arXiv 2312.03732), with ranks and alphas by
pattern. Whatever else would change the logits that peft computes is refused by the name of its key or tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from locus_fast.errors import UserError, reason
from locus_fast.families import held_name
from locus_fast.quantize import PROJECTIONS, optional

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every name in peft's files
LAYERS = r"(.*\.)?language_model\.layers\.\d+\.(self_attn|mlp)\.({kinds})"  # a regex for layers by the kinds of their parts
REMEDY = "merge it into its base with peft first"

# Keys of adapter_config.json. What is in none of the three must be unset.
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "target_modules"}
READ |= {"base_model_name_or_path", "peft_type", "revision", "bias"}
OF_TRAINING = {"auto_mapping", "inference_mode", "lora_dropout", "peft_version", "task_type", "runtime_config"}
WITHOUT_EFFECT = {  # on what adapters compute once they are loaded; fan_in_fan_out is of layers that no family has
    *("corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size"),
}
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")  # init_lora_weights that leave the base as it is


@dataclass(frozen=True)
class Pair:
    """One layer's adapter: it adds scale * up @ down to the layer's weight."""

    down: Tensor  # float32 [rank, in]
    up: Tensor  # float32 [out, rank]
    scale: float

    @property
    def rank(self) -> int:
        return len(self.down)


def joined(pairs: list[Pair]) -> Pair:
    """One pair that computes the sum of several, in their order along its rank. The last keeps its values and its scale to
    the bit; the others take up what theirs differs by."""
    last = pairs[-1]
    ups = [*(pair.up * (pair.scale / last.scale) for pair in pairs[:-1]), last.up]
    return Pair(torch.cat([pair.down for pair in pairs]), torch.cat(ups, 1), last.scale)


def is_adapter_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """The folder or hub id of the base that saved adapters belong to. Raises UserError if the config names none."""
    base = _config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / CONFIG} does not say which model it adapts: set base_model_name_or_path to the base's folder or hub id.")
    return base


def dropout_of(folder: Path) -> float:
    """The dropout that saved adapters were trained with, as their config states it; 0 where it states none."""
    stated: Any = _config(folder).get("lora_dropout")
    return float(stated) if _is_number(stated) else 0.0


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read as the config of an adapter ({type(error).__name__}).") from None


def read_adapters(folder: Path, linears: Mapping[str, tuple[int, int]]) -> dict[str, Pair]:
    """The adapters of a folder by the model's names of their layers, at least one, in host memory.

    linears: (out, in) of each layer that can have one. Names from before transformers 4.52 are understood. Raises
    UserError, naming key or tensor, for what is not whole, not finite, of another model, or more than plain LoRA.
    """
    config = _config(folder)
    _check_keys(folder, config)
    tensors = _read_tensors(folder)
    halves: dict[str, dict[str, str]] = {}  # a layer's stored name -> side -> tensor
    others = []
    for name in sorted(tensors):
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if found and held_name(found[1], linears):
            halves.setdefault(found[1], {})[found[2]] = name
        else:
            others.append(name)
    if others:
        what = f"{len(others)} tensors that are no adapters of the language model's linear layers, the first {others[0]}"
        raise UserError(f"{folder / WEIGHTS} holds {what}: {REMEDY}.")
    if not halves:
        raise UserError(f"{folder / WEIGHTS} holds no adapters: save them again, or give the base itself as --model.")
    pairs = {}
    for stored, sides in halves.items():
        layer = held_name(stored, linears)
        assert layer is not None
        pairs[layer] = _pair(folder, config, stored, {side: (name, tensors[name]) for side, name in sides.items()}, linears[layer])
    _check_targets(folder, config, halves, linears)
    return pairs


def _check_keys(folder: Path, config: dict[str, Any]) -> None:
    """Raises UserError for the first key whose value changes what the adapters compute in a way that is not computed here."""
    file = folder / CONFIG
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{file}: peft_type is {config['peft_type']!r}, and only LORA is computed here: {REMEDY}.")
    for key, value in sorted(config.items()):
        if key not in READ | OF_TRAINING | WITHOUT_EFFECT and value:
            raise UserError(f"{file}: {key} is {_shown(value)}, a variant of LoRA that is not computed here: {REMEDY}.")
    if config.get("bias", "none") != "none":
        raise UserError(f"{file}: bias is {_shown(config['bias'])}, and biases are not adapted here: {REMEDY}.")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS and start is not None:
        how = "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        raise UserError(
            f"{file}: init_lora_weights is {_shown(start)}, which took a part of the base's weights away when training began, so "
            f"these adapters do not belong to the base as it is: save them as plain LoRA by peft's {how}, or {REMEDY}."
        )
    if config.get("revision") not in (None, "", "main"):
        raise UserError(f"{file}: revision is {_shown(config['revision'])}: fetch that one, and set base_model_name_or_path to its folder.")
    if missing := [key for key in ("r", "lora_alpha") if key not in config]:
        raise UserError(f"{folder} does not hold whole adapters: {CONFIG} has no {missing[0]}.")
    if not _is_rank(config["r"]):
        raise UserError(f"{file}: r is {_shown(config['r'])}, and must be a whole number above 0.")
    if not _is_number(config["lora_alpha"]):
        raise UserError(f"{file}: lora_alpha is {_shown(config['lora_alpha'])}, and must be a finite number.")
    for key, good, words in (("rank_pattern", _is_rank, "whole numbers above 0"), ("alpha_pattern", _is_number, "finite numbers")):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(_is_regex(name) and good(value) for name, value in pattern.items()):
            raise UserError(f"{file}: {key} is {_shown(pattern)}, and must give {words} by patterns of layer names.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    if not file.is_file() and (folder / PICKLE).is_file():
        raise UserError(f"{folder / PICKLE} is in pickle format, which is never loaded as it may run code: save the adapters as {WEIGHTS} with peft.")
    try:
        return load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} does not hold whole adapters: {WEIGHTS} cannot be read ({reason(error)}).") from None


def _pair(folder: Path, config: dict[str, Any], stored: str, sides: dict[str, tuple[str, Tensor]], layer: tuple[int, int]) -> Pair:
    """The pair of a layer, whose weight is layer = (out, in), from its two named tensors."""
    file, (out, inputs) = folder / WEIGHTS, layer
    if len(sides) < 2:
        (side, (name, _)), other = next(iter(sides.items())), {"A": "lora_B", "B": "lora_A"}
        raise UserError(f"{file}: {name} has no {other[side]} beside it, so the file is not whole: save the adapters again.")
    rank = _by_pattern(config.get("rank_pattern"), stored, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), stored, config["lora_alpha"])
    for side, shape in (("A", [rank, inputs]), ("B", [out, rank])):
        name, tensor = sides[side]
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise UserError(f"{file}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, and adapters are of 16 bits or more.")
        if list(tensor.shape) != shape:
            raise UserError(
                f"{file}: {name} has shape {list(tensor.shape)}, and should have {shape}, by rank {rank} of {CONFIG} and a layer of "
                f"{inputs} inputs and {out} outputs: config, tensors or base are those of other adapters."
            )
        if not tensor.isfinite().all():
            raise UserError(f"{file}: {name} holds values that are not finite: train these adapters again.")
    down, up = (sides[side][1].float() for side in "AB")
    return Pair(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(pattern: dict[str, Any] | None, layer: str, default: Any) -> Any:
    """The value of the first pattern that a layer's name ends in, as peft matches them; else the default."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def _check_targets(folder: Path, config: dict[str, Any], stored: Mapping[str, Any], linears: Mapping[str, Any]) -> None:
    """Raises UserError if target_modules leaves out a layer that has tensors, which peft would pass over, or names one that
    has none, which peft would begin anew. A config without target_modules is not judged."""
    targets = config.get("target_modules")
    if not targets or targets == "all-linear":
        return
    if not isinstance(targets, str | list) or not all(isinstance(target, str) for target in targets):
        raise UserError(f"{folder / CONFIG}: target_modules is {_shown(targets)}, and must be a pattern or a list of names.")
    if isinstance(targets, str) and not _is_regex(targets):
        raise UserError(f"{folder / CONFIG}: target_modules is {_shown(targets)}, which is no regular expression.")
    if left := [name for name in stored if not _targeted(name, targets)]:
        what = f"{WEIGHTS} has adapters of {left[0]}, which target_modules of {CONFIG} does not name"
        raise UserError(f"{folder}: {what}: one of the two is of other adapters.")
    if any(config.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern")):
        return  # they leave out layers that target_modules names
    held = {held_name(name, linears) for name in stored}
    if missing := [name for name in linears if name not in held and _targeted(name, targets)]:
        what = f"target_modules of {CONFIG} names {missing[0]}, of which {WEIGHTS} has no tensors"
        raise UserError(f"{folder}: {what}: the file is not whole, save the adapters again.")


def _targeted(layer: str, targets: str | list[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def peft_config(scales: Mapping[str, tuple[int, float]], base: str | None, layers: Mapping[str, Any]) -> Any:
    """peft's LoraConfig of adapters with these (rank, scale) by layer. layers: all that could have one. Raises UserError
    without peft."""
    peft = optional("peft", "--lora or a --model of adapters")
    (rank, scale), _ = Counter(scales.values()).most_common(1)[0]
    others = {name: pair for name, pair in scales.items() if pair != (rank, scale)}
    return peft.LoraConfig(
        r=rank,
        lora_alpha=_alpha(rank, scale),
        rank_pattern={name: each for name, (each, _) in others.items()},
        alpha_pattern={name: _alpha(*pair) for name, pair in others.items()},
        target_modules=_targets(scales.keys(), layers.keys()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=base is not None,
    )


def _alpha(rank: int, scale: float) -> float:
    """lora_alpha: whole where it is, for readers that take nothing else."""
    alpha = rank * scale
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _targets(chosen: Any, layers: Any) -> str | list[str]:
    """target_modules: by the kinds of the layers' parts where these choose no others, else every name."""
    kinds = [kind for kind in PROJECTIONS if any(name.endswith(f".{kind}") for name in chosen)]
    pattern = LAYERS.format(kinds="|".join(kinds))
    return pattern if {name for name in layers if re.fullmatch(pattern, name)} == set(chosen) else sorted(chosen)


def write_pairs(pairs: Mapping[str, Pair], base: str, folder: Path, layers: Mapping[str, Any]) -> None:
    """Adapters into an existing folder as peft lays them. base: the folder or hub id of the model that they belong to;
    layers: all of its layers that could have one."""
    peft_config({name: (pair.rank, pair.scale) for name, pair in pairs.items()}, base, layers).save_pretrained(str(folder))
    save_file(dict(named_tensors(pairs)), folder / WEIGHTS, metadata={"format": "pt"})


def named_tensors(pairs: Mapping[str, Pair]) -> Iterator[tuple[str, Tensor]]:
    """The two tensors of each pair in host memory, by their names in peft's files."""
    for layer, pair in pairs.items():
        for side, tensor in (("A", pair.down), ("B", pair.up)):
            yield f"{PREFIX}{layer}.lora_{side}.weight", tensor.detach().to("cpu", torch.float32).contiguous()
