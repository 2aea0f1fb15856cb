"""Models in and out of folders in the Hugging Face layout, and the optimizer's state beside them. Safetensors only, nothing is unpickled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from locus_fast.errors import UserError
from locus_fast.policy import use_attention
from locus_fast.prompts import FAMILIES

transformers_logging.disable_progress_bar()

TINY_BASE = Path(__file__).parent / "tiny" / "base"
COPIED = (  # what a model folder holds beside config and weights
    *("preprocessor_config.json", "video_preprocessor_config.json", "chat_template*"),
    *("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*"),
)


def model_folder(name: str) -> Path:
    """The folder of a model: the embedded base for an empty name, a path, or the local copy of a hub id (fetched if it is not there)."""
    if not name:
        return TINY_BASE
    folder = Path(name)
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"--model {name}: there is no such folder.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except Exception as error:  # the hub client raises many kinds; each means that the model is not to be had
        raise UserError(f"--model {name}: no such folder, and it could not be fetched from the hub ({type(error).__name__}).") from None


def load_model(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder: float32 on the device, our attention, evaluation mode."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: give the folder of a model in Hugging Face layout.")
    if not list(folder.glob("*.safetensors")):
        pickled = ", in pickle format, which is not loaded: convert it to safetensors first" if list(folder.glob("*.bin")) else ""
        raise UserError(f"{folder} has no *.safetensors weights{pickled}.")
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type not in FAMILIES:
            raise UserError(f"{folder}: model type '{config.model_type}' cannot be trained; the families are {', '.join(sorted(FAMILIES))}.")
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{folder} could not be loaded as a model: {first}") from None
    use_attention(model)
    return model.to(device).eval(), tokenizer


def save_model(model: Any, source: Path, folder: Path) -> None:
    """The model in the layout it came in: weights and config by transformers, every other file as it stands in `source`."""
    model.save_pretrained(folder)
    for pattern in COPIED:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def save_checkpoint(folder: Path, model: Any, source: Path, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A folder that `load_optimizer` and `load_model` go on from; written beside and renamed, so that it is whole or absent."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, source, partial)
    states: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        states |= {f"{index}.{key}": value.contiguous() for key, value in state.items()}
    save_file(states, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> int:
    """Put the saved state into the optimizer; returns the number of steps done."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "optimizer.safetensors").items():
        index, key = name.split(".", 1)
        states.setdefault(int(index), {})[key] = value
    whole = optimizer.state_dict()
    optimizer.load_state_dict({**whole, "state": states})
    return int(json.loads((folder / "state.json").read_text())["step"])
