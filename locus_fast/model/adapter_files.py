"""Saved adapters in peft's layout: their names and their config, one pair of matrices a layer, and how they
are written so that plain peft loads them. `locus_fast.weights.adapter_reader` reads and judges them."""

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
from torch import Tensor

from locus_fast.errors import UserError
from locus_fast.files import save_tensors
from locus_fast.libraries import optional
from locus_fast.model.quantize import PROJECTIONS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in peft's files
LAYERS = (
    r"(.*\.)?language_model\.layers\.\d+\.(self_attn|mlp)\.({kinds})"  # a regex, by kinds of linear layers
)


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
    """One pair that computes the sum of several, in their order along its rank. The last keeps its values and
    its scale to the bit; the others take up what theirs differs by."""
    last = pairs[-1]
    ups = [*(pair.up * (pair.scale / last.scale) for pair in pairs[:-1]), last.up]
    return Pair(torch.cat([pair.down for pair in pairs]), torch.cat(ups, 1), last.scale)


def is_adapter_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """The folder or hub id of the base that saved adapters belong to. Raises UserError if the config names
    none."""
    base = config_of(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        remedy = "set base_model_name_or_path to the base's folder or hub id"
        raise UserError(f"{folder / CONFIG} does not say which model it adapts: {remedy}.")
    return base


def dropout_of(folder: Path) -> float:
    """The dropout that saved adapters were trained with, as their config states it; 0 where it states
    none."""
    stated: Any = config_of(folder).get("lora_dropout")
    return float(stated) if is_number(stated) else 0.0


def config_of(folder: Path) -> dict[str, Any]:
    """The config of saved adapters. Raises UserError if it cannot be read."""
    try:
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        why = type(error).__name__
        raise UserError(f"{folder / CONFIG} cannot be read as the config of an adapter ({why}).") from None


def is_number(value: Any) -> bool:
    """Whether it is finite, in float32 too, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30


def peft_config(scales: Mapping[str, tuple[int, float]], base: str | None, layers: Mapping[str, Any]) -> Any:
    """peft's LoraConfig of adapters with these (rank, scale) by layer. layers: all that could have one.
    Raises UserError without peft."""
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
    matched = {name for name in layers if re.fullmatch(pattern, name)}
    return pattern if matched == set(chosen) else sorted(chosen)


def write_pairs(pairs: Mapping[str, Pair], base: str, folder: Path, layers: Mapping[str, Any]) -> None:
    """Adapters into an existing folder as peft lays them. base: the folder or hub id of the model that they
    belong to; layers: all of its layers that could have one."""
    scales = {name: (pair.rank, pair.scale) for name, pair in pairs.items()}
    peft_config(scales, base, layers).save_pretrained(str(folder))
    save_tensors(dict(named_tensors(pairs)), folder / WEIGHTS, {"format": "pt"})


def named_tensors(pairs: Mapping[str, Pair]) -> Iterator[tuple[str, Tensor]]:
    """The two tensors of each pair in host memory, by their names in peft's files."""
    for layer, pair in pairs.items():
        for side, tensor in (("A", pair.down), ("B", pair.up)):
            yield f"{PREFIX}{layer}.lora_{side}.weight", tensor.detach().to("cpu", torch.float32).contiguous()
