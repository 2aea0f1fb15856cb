"""Ways to spoil a folder of adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]
Spoil = Callable[[Path], Any]


def tensors(change: Callable[[Tensors], Any]) -> Spoil:
    """Changes the tensors in place, or gives others."""

    def spoil(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        save_file(change(held) or held, folder / WEIGHTS)

    return spoil


def each(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Spoil:
    return tensors(lambda held: {name: change(name, tensor).contiguous() for name, tensor in held.items()})


def each_name(change: Callable[[str], str]) -> Spoil:
    return tensors(lambda held: {change(name): tensor for name, tensor in held.items()})


def keys(**changes: Any) -> Spoil:
    """Changes keys of the config; None takes one away."""

    def spoil(folder: Path) -> None:
        content = {**json.loads((folder / CONFIG).read_text()), **changes}
        (folder / CONFIG).write_text(
            json.dumps({key: value for key, value in content.items() if value is not None})
        )

    return spoil
