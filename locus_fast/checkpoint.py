"""Models in and out of folders in the Hugging Face layout, and the optimizer's state beside them. Safetensors only, nothing is unpickled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from locus_fast.adapter_files import is_adapter_folder
from locus_fast.adapters import has_adapters, load_adapters, write_adapters
from locus_fast.errors import UserError, reason
from locus_fast.families import family_of
from locus_fast.optim import load_state_tensors, state_tensors
from locus_fast.policy import use_attention
from locus_fast.processor import write_limits
from locus_fast.shards import load_weights, stored_dtype, write_model
from locus_fast.source import Source, check_config, read_source

transformers_logging.disable_progress_bar()

TINY_BASE = Path(__file__).parent / "tiny" / "base"
SMALL_FILES = ["*.json", "*.txt", "*.jinja"]  # of a model on the hub: all but its weights


def is_hub_id(name: str) -> bool:
    """Whether a model's name is no folder but has the form of a hub id."""
    return bool(name) and not Path(name).is_dir() and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def model_folder(name: str) -> Path:
    """The folder of a model: the embedded base for an empty name, a path, or the local copy of a hub id (fetched if it is not there)."""
    if not is_hub_id(name):
        folder = Path(name) if name else TINY_BASE
        if not folder.is_dir():
            raise UserError(f"--model {name}: there is no such folder; give that of a model in Hugging Face layout, or a hub id.")
        return folder
    from huggingface_hub import snapshot_download

    try:
        small = Path(snapshot_download(name, allow_patterns=SMALL_FILES))
        if not is_adapter_folder(small):
            check_config(small)  # before the weights, which are large, are fetched
        return Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, "*.safetensors"]))
    except UserError:
        raise
    except Exception as error:  # the hub client raises many kinds; each means that the model is not to be had
        why = f"it could not be fetched from the hub ({type(error).__name__})"
        raise UserError(f"--model {name}: no such folder, and {why}; check id and connection, or give the folder of a copy with --model.") from None


def load_model(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder, see `read_source` and `load_source`."""
    source = read_source(folder)
    return load_source(source, device, dtype), source.tokenizer


def load_source(source: Source, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The model, on the device, with our attention, in evaluation mode.

    dtype: of every parameter; None for the checkpoint's own: what its config states (bfloat16 for the published ones), else what its tensors have.
    The weights are views of the mapped files until they are moved or written to, so host memory never holds a copy of them beside the model.
    """
    transformers_logging.set_verbosity_error()  # its table of missing tensors says at length what the sentence below says
    wanted = weight_dtype(source.folder, source.config, dtype)
    load: Any = AutoModelForImageTextToText.from_pretrained
    try:
        model, found = load(source.folder, dtype=wanted, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source.folder} could not be loaded as a model: {reason(error)}") from None
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{source.folder}: {len(missing)} of the model's tensors are in none of its weight files, the first {missing[0]}.")
    if source.config.tie_word_embeddings and model.lm_head.weight is not model.get_input_embeddings().weight:
        what = "tie_word_embeddings is true, and lm_head.weight is stored with other values than the embedding"
        raise UserError(f"{source.folder / 'config.json'}: {what}: set it to false to train the head that is stored, or fetch the model again.")
    _stop_at_turns(model, source.tokenizer, family_of(source.config).stop)
    use_attention(model)
    return model.to(device).eval()


def weight_dtype(folder: Path, config: Any, dtype: torch.dtype | None) -> torch.dtype:
    """What the weights of a folder are loaded in: `dtype`, else what its config states, else what its tensors have."""
    return dtype or config.dtype or config.get_text_config().dtype or stored_dtype(folder)


def _stop_at_turns(model: Any, tokenizer: Any, stop: str) -> None:
    """Let replies end at the token that ends a turn, besides those that generation_config.json names (the file itself stays as it is)."""
    stated = model.generation_config.eos_token_id
    stops = stated if isinstance(stated, list) else [] if stated is None else [stated]
    turn = tokenizer.get_vocab().get(stop)
    if turn is not None and turn not in stops:
        model.generation_config.eos_token_id = [*stops, turn]


def save_model(model: Any, source: Path, folder: Path, dtype: torch.dtype | None = None, limits: tuple[int, int] | None = None) -> None:
    """The model in the layout it came in, as `source` has it (see `shards.write_model`). Written beside and renamed: whole or absent.

    limits: the fewest and most pixels that the config of its image processor is to have; None for those of the source.
    """
    with whole_or_absent(folder) as partial:
        write_model(model, source, partial, dtype)
        if limits:
            write_limits(partial, limits)


def save_adapters(model: Any, base: str, folder: Path) -> None:
    """The adapters of the model `base`, a folder or hub id, in peft's layout. Whole or absent."""
    with whole_or_absent(folder) as partial:
        write_adapters(model, base, partial)


@contextmanager
def whole_or_absent(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its name, and its place, when the block has ended well."""
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder} could not be written: {error.strerror or error} ({error.filename or partial}).") from None


def save_checkpoint(run: Path, model: Any, source: Path, optimizer: torch.optim.Optimizer, step: int) -> None:
    """`checkpoints/step-N` of a run folder: the model in the dtype it is trained in, or of one with adapters these alone, and what `load_checkpoint`
    needs besides."""
    with whole_or_absent(run / "checkpoints" / f"step-{step:06d}") as partial:
        if has_adapters(model):
            write_adapters(model, str(source.resolve()), partial)
        else:
            write_model(model, source, partial, model.dtype)
        (partial / "optimizer").mkdir()
        save_file(state_tensors(optimizer), partial / "optimizer" / "state.safetensors")
        (partial / "optimizer" / "step.json").write_text(json.dumps({"step": step}))


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
    try:
        (load_adapters if has_adapters(model) else load_weights)(folder, model)
        load_state_tensors(optimizer, load_file(folder / "optimizer" / "state.safetensors"))
    except (UserError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _not_whole(folder, error) from None


def _not_whole(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder} is not a whole checkpoint ({reason(error)}): remove it to resume an earlier one.")
