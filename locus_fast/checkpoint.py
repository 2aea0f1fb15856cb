"""Models in and out of folders in the Hugging Face layout, and the optimizer's state beside them. Safetensors only, nothing is unpickled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from locus_fast.errors import UserError
from locus_fast.optim import load_state_tensors, state_tensors
from locus_fast.policy import use_attention
from locus_fast.prompts import FAMILIES

transformers_logging.disable_progress_bar()

TINY_BASE = Path(__file__).parent / "tiny" / "base"
COPIED = (  # what a model folder holds beside config and weights
    *("preprocessor_config.json", "video_preprocessor_config.json", "chat_template*"),
    *("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*"),
)


def is_hub_id(name: str) -> bool:
    """Whether a model's name is no folder but has the form of a hub id."""
    return bool(name) and not Path(name).is_dir() and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def model_folder(name: str) -> Path:
    """The folder of a model: the embedded base for an empty name, a path, or the local copy of a hub id (fetched if it is not there)."""
    if not is_hub_id(name):
        folder = Path(name) if name else TINY_BASE
        if not folder.is_dir():
            raise UserError(f"--model {name}: there is no such folder.")
        return folder
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
    transformers_logging.set_verbosity_error()  # its table of missing tensors says at length what the sentence below says
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type not in FAMILIES:
            raise UserError(f"{folder}: model type '{config.model_type}' cannot be trained; the families are {', '.join(sorted(FAMILIES))}.")
        load: Any = AutoModelForImageTextToText.from_pretrained
        model, found = load(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{folder} could not be loaded as a model: {type(error).__name__}, {first}") from None
    if wrong := sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"]):
        raise UserError(f"{folder}: {len(wrong)} of the model's tensors are missing from its weights, or of another shape, the first {wrong[0]}.")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: copy the tokenizer's files of the base model there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{folder}: its tokenizer could not be loaded: {type(error).__name__}, {first}") from None
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
    (partial / "optimizer").mkdir()
    save_file(state_tensors(optimizer), partial / "optimizer" / "state.safetensors")
    (partial / "optimizer" / "step.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def latest_checkpoint(run: Path) -> tuple[Path, int]:
    """The checkpoint of a run folder with the most steps, and their number."""
    found = sorted((run / "checkpoints").glob("step-" + "[0-9]" * 6))
    if not found:
        raise UserError(f"--resume {run}: there is no checkpoint in its folder `checkpoints`.")
    try:
        return found[-1], int(json.loads((found[-1] / "optimizer" / "step.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_whole(found[-1], error) from None


def load_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved weights and optimizer state in place."""
    saved, _ = load_model(folder, model.device)
    try:
        model.load_state_dict(saved.state_dict())
        load_state_tensors(optimizer, load_file(folder / "optimizer" / "state.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _not_whole(folder, error) from None


def _not_whole(folder: Path, error: Exception) -> UserError:
    first = str(error).strip().split("\n")[0]
    return UserError(f"{folder} is not a whole checkpoint ({type(error).__name__}, {first}): remove it to resume an earlier one.")
