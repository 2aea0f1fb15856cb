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


def check_folder(folder: Path) -> None:
    """Raises UserError unless the folder has a config and safetensors weights; cheap, so done before anything else."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: give the folder of a model in Hugging Face layout.")
    if not list(folder.glob("*.safetensors")):
        pickled = ", in pickle format, which is not loaded: convert it to safetensors first" if list(folder.glob("*.bin")) else ""
        raise UserError(f"{folder} has no *.safetensors weights{pickled}.")


def load_model(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder: float32 on the device, our attention, evaluation mode."""
    check_folder(folder)
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


def save_checkpoint(run: Path, model: Any, source: Path, optimizer: torch.optim.Optimizer, step: int) -> None:
    """`checkpoints/step-N` of a run folder: the model, and what `load_checkpoint` needs besides. Written beside and renamed: whole or absent."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, source, partial)
    states = {f"{index}.{key}": value for index, state in optimizer.state_dict()["state"].items() for key, value in state.items()}
    (partial / "optimizer").mkdir()
    save_file(states, partial / "optimizer" / "state.safetensors")
    (partial / "optimizer" / "step.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def latest_checkpoint(run: Path) -> Path:
    """The checkpoint of a run folder with the most steps."""
    found = sorted((run / "checkpoints").glob("step-" + "[0-9]" * 6))
    if not found:
        raise UserError(f"--resume {run}: there is no checkpoint in its folder `checkpoints`.")
    return found[-1]


def load_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Put the saved weights and optimizer state in place; returns the number of steps done."""
    saved, _ = load_model(folder, model.device)
    model.load_state_dict(saved.state_dict())
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "optimizer" / "state.safetensors").items():
        index, key = name.split(".", 1)
        states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return int(json.loads((folder / "optimizer" / "step.json").read_text())["step"])
