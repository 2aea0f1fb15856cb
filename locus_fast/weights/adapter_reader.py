"""Saved adapters read and judged, without peft.

What is computed from a config: LoRA (arXiv 2106.09685) of the language model's linear layers, a layer's
product scaled by alpha / rank, or by alpha / sqrt(rank) where it is rank-stabilised (arXiv 2312.03732), with
ranks and alphas by pattern. Whatever else would change the logits that peft computes is refused by the name
of its key or tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from locus_fast.errors import UserError, reason
from locus_fast.model.adapter_files import CONFIG, PREFIX, WEIGHTS, Pair, config_of, is_number
from locus_fast.model.families import held_name

PICKLE = "adapter_model.bin"
REMEDY = "merge it into its base with peft first"

# Keys of adapter_config.json. What is in none of the three must be unset.
READ = {
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "target_modules",
}
READ |= {"base_model_name_or_path", "peft_type", "revision", "bias"}
OF_TRAINING = {
    "auto_mapping",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "task_type",
    "runtime_config",
}
WITHOUT_EFFECT = {  # on what loaded adapters compute; fan_in_fan_out is of layers that no family has
    *(
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "layers_pattern",
    ),
    *(
        "layers_to_transform",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "qalora_group_size",
    ),
}
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")  # init_lora_weights that leave the base


def read_adapters(folder: Path, linears: Mapping[str, tuple[int, int]]) -> dict[str, Pair]:
    """The adapters of a folder by the model's names of their layers, at least one, in host memory.

    linears: (out, in) of each layer that can have one. Names from before transformers 4.52 are understood.
    Raises UserError, naming key or tensor, for what is not whole, not finite, of another model, or more than
    plain LoRA.
    """
    config = config_of(folder)
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
        what = f"{len(others)} tensors that are no adapters of the language model's linear layers"
        raise UserError(f"{folder / WEIGHTS} holds {what}, the first {others[0]}: {REMEDY}.")
    if not halves:
        raise UserError(
            f"{folder / WEIGHTS} holds no adapters: save them again, or give the base itself as --model."
        )
    pairs = {}
    for stored, sides in halves.items():
        layer = held_name(stored, linears)
        assert layer is not None
        named = {side: (name, tensors[name]) for side, name in sides.items()}
        pairs[layer] = _pair(folder, config, stored, named, linears[layer])
    _check_targets(folder, config, halves, linears)
    return pairs


def _check_keys(folder: Path, config: dict[str, Any]) -> None:
    """Raises UserError for the first key whose value changes what the adapters compute in a way that is not
    computed here."""
    file = folder / CONFIG
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(
            f"{file}: peft_type is {config['peft_type']!r}, and only LORA is computed here: {REMEDY}."
        )
    for key, value in sorted(config.items()):
        if key not in READ | OF_TRAINING | WITHOUT_EFFECT and value:
            raise UserError(
                f"{file}: {key} is {_shown(value)}, a variant of LoRA that is not computed here: {REMEDY}."
            )
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{file}: bias is {_shown(config['bias'])}, and biases are not adapted here: {REMEDY}."
        )
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS and start is not None:
        what = f"init_lora_weights is {_shown(start)}, which took a part of the base's weights away at first"
        how = "peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        remedy = f"save them as plain LoRA by {how}, or {REMEDY}"
        raise UserError(f"{file}: {what}, so these adapters do not belong to the base as it is: {remedy}.")
    if config.get("revision") not in (None, "", "main"):
        remedy = "fetch that one, and set base_model_name_or_path to its folder"
        raise UserError(f"{file}: revision is {_shown(config['revision'])}: {remedy}.")
    if missing := [key for key in ("r", "lora_alpha") if key not in config]:
        raise UserError(f"{folder} does not hold whole adapters: {CONFIG} has no {missing[0]}.")
    if not _is_rank(config["r"]):
        raise UserError(f"{file}: r is {_shown(config['r'])}, and must be a whole number above 0.")
    if not is_number(config["lora_alpha"]):
        raise UserError(f"{file}: lora_alpha is {_shown(config['lora_alpha'])}, and must be a finite number.")
    patterns = (
        ("rank_pattern", _is_rank, "whole numbers above 0"),
        ("alpha_pattern", is_number, "finite numbers"),
    )
    for key, good, words in patterns:
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(
            _is_regex(name) and good(value) for name, value in pattern.items()
        ):
            raise UserError(
                f"{file}: {key} is {_shown(pattern)}, and must give {words} by patterns of layer names."
            )


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    if not file.is_file() and (folder / PICKLE).is_file():
        remedy = f"save the adapters as {WEIGHTS} with peft"
        raise UserError(
            f"{folder / PICKLE} is in pickle format, which is never loaded as it may run code: {remedy}."
        )
    try:
        return load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder} does not hold whole adapters: {WEIGHTS} cannot be read ({reason(error)})."
        ) from None


def _pair(
    folder: Path, config: dict[str, Any], stored: str, sides: dict[str, Any], layer: tuple[int, int]
) -> Pair:
    """The pair of a layer whose weight is [out, in] = layer. sides: "A" and "B" -> (name, tensor)."""
    file, (out, inputs) = folder / WEIGHTS, layer
    if len(sides) < 2:
        (side, (name, _)), other = next(iter(sides.items())), {"A": "lora_B", "B": "lora_A"}
        what = f"{name} has no {other[side]} beside it, so the file is not whole"
        raise UserError(f"{file}: {what}: save the adapters again.")
    rank = _by_pattern(config.get("rank_pattern"), stored, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), stored, config["lora_alpha"])
    for side, shape in (("A", [rank, inputs]), ("B", [out, rank])):
        name, tensor = sides[side]
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{file}: {name} is stored as {kind}, and adapters are floating point of 16 bits or more."
            )
        if list(tensor.shape) != shape:
            what = f"{name} has shape {list(tensor.shape)}, and should have {shape}"
            why = f"by rank {rank} of {CONFIG} and a layer of {inputs} inputs and {out} outputs"
            raise UserError(f"{file}: {what}, {why}: config, tensors or base are those of other adapters.")
        if not tensor.isfinite().all():
            raise UserError(f"{file}: {name} holds values that are not finite: train these adapters again.")
    down, up = (sides[side][1].float() for side in "AB")
    return Pair(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(pattern: dict[str, Any] | None, layer: str, default: Any) -> Any:
    """The value of the first pattern that a layer's name ends in, as peft matches them; else the default."""
    found = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(found, default)


def _check_targets(
    folder: Path, config: dict[str, Any], stored: Mapping[str, Any], linears: Mapping[str, Any]
) -> None:
    """Raises UserError if target_modules leaves out a layer that has tensors, which peft would pass over, or
    names one that has none, which peft would begin anew. A config without target_modules is not judged."""
    targets = config.get("target_modules")
    if not targets or targets == "all-linear":
        return
    if not isinstance(targets, str | list) or not all(isinstance(target, str) for target in targets):
        what = f"target_modules is {_shown(targets)}, and must be a pattern or a list of names"
        raise UserError(f"{folder / CONFIG}: {what}.")
    if isinstance(targets, str) and not _is_regex(targets):
        raise UserError(
            f"{folder / CONFIG}: target_modules is {_shown(targets)}, which is no regular expression."
        )
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


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
