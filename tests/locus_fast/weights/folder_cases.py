"""What lies in a model's folder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

CPU = torch.device("cpu")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
