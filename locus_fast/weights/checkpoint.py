"""Models in and out of folders in the Hugging Face layout, and the optimizer's state beside them. Safetensors
only, nothing is unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from locus_fast.config.folders import refuse_run
from locus_fast.errors import UserError, reason
from locus_fast.files import crc_of, refuse_endless, refuse_endless_in, whole_or_absent
from locus_fast.model.adapter_files import is_adapter_folder
from locus_fast.model.adapters import has_adapters, load_adapters, write_adapters
from locus_fast.model.attention import use_attention
from locus_fast.model.families import family_of
from locus_fast.model.processor import write_limits
from locus_fast.step.optimizers import load_state_tensors, state_tensors
from locus_fast.weights.finite import first_not_finite
from locus_fast.weights.shards import load_weights, stored_dtype, write_model, write_tensors
from locus_fast.weights.source import Source, check_config, read_source

TINY_BASE = Path(__file__).parents[1] / "tiny" / "base"
STATE, STEP = "optimizer/state.safetensors", "optimizer/step.json"  # in a checkpoint
NAMED = re.compile(r"step-(\d{6,})", re.ASCII)
SMALL_FILES = ["*.json", "*.txt", "*.jinja"]  # of a model on the hub: all but its weights


def is_hub_id(name: str) -> bool:
    """Whether a model's name is no folder but has the form of a hub id."""
    return (
        bool(name)
        and not Path(name).exists()
        and name.count("/") == 1
        and not name.startswith((".", "/", "~"))
    )


def model_folder(name: str) -> Path:
    """The folder of a model: the embedded base for an empty name, a path, or the local copy of a hub id
    (fetched if it is not there). Raises UserError for what is no folder of a model, a run folder among them.
    """
    refuse_endless(Path(name), "--model")
    if not is_hub_id(name):
        folder = Path(name) if name else TINY_BASE
        if folder.is_file():
            raise UserError(f"--model {name} is a file: give the folder of a model in Hugging Face layout.")
        if not folder.is_dir():
            raise UserError(
                f"--model {name}: there is no such folder; give that of a model in Hugging Face layout, or "
                "a hub id."
            )
        refuse_run(folder)
        refuse_endless_in(folder)
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
        raise UserError(
            f"--model {name}: no such folder, and {why}; check id and connection, or give the folder of a "
            "copy with --model."
        ) from None


def load_model(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder, see `read_source` and `load_source`."""
    source = read_source(folder)
    return load_source(source, device, dtype), source.tokenizer


def load_source(source: Source, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The model, on the device, with our attention, in evaluation mode.

    dtype: of every parameter; None for the checkpoint's own: what its config states (bfloat16 for the
    published ones), else what its tensors have. The weights are views of the mapped files until they are
    moved or written to, so host memory never holds a copy of them beside the model.
    """
    wanted = weight_dtype(source.folder, source.config, dtype)
    load: Any = AutoModelForImageTextToText.from_pretrained
    try:
        model, found = load(source.folder, config=source.config, dtype=wanted, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source.folder} could not be loaded as a model: {reason(error)}") from None
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{source.folder}: {len(missing)} of the model's tensors are in none of its weight files, the "
            f"first {missing[0]}."
        )
    if source.config.tie_word_embeddings and model.lm_head.weight is not model.get_input_embeddings().weight:
        what = (
            "tie_word_embeddings is true, and lm_head.weight is stored with other values than the embedding"
        )
        raise UserError(
            f"{source.folder / 'config.json'}: {what}: set it to false to train the head that is stored, or "
            "fetch the model again."
        )
    _stop_at_turns(model, source.tokenizer, family_of(source.config).stop)
    use_attention(model)
    return model.to(device).eval()


def weight_dtype(folder: Path, config: Any, dtype: torch.dtype | None) -> torch.dtype:
    """What the weights of a folder are loaded in: `dtype`, else what its config states, else what its tensors
    have."""
    return dtype or config.dtype or config.get_text_config().dtype or stored_dtype(folder)


def _stop_at_turns(model: Any, tokenizer: Any, stop: str) -> None:
    """Let replies end at the token that ends a turn, besides those that generation_config.json names (the
    file itself stays as it is)."""
    stated = model.generation_config.eos_token_id
    stops = stated if isinstance(stated, list) else [] if stated is None else [stated]
    turn = tokenizer.get_vocab().get(stop)
    if turn is not None and turn not in stops:
        model.generation_config.eos_token_id = [*stops, turn]


def save_model(
    model: Any,
    source: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    limits: tuple[int, int] | None = None,
) -> None:
    """The model in the layout it came in, as `source` has it (see `shards.write_model`). Written beside and
    renamed: whole or absent.

    limits: the fewest and most pixels that the config of its image processor is to have; None for those of
    the source.
    """
    with whole_or_absent(folder) as partial:
        write_model(model, source, partial, dtype)
        if limits:
            write_limits(partial, limits)


def save_adapters(model: Any, base: str, folder: Path) -> None:
    """The adapters of the model `base`, a folder or hub id, in peft's layout. Whole or absent."""
    with whole_or_absent(folder) as partial:
        write_adapters(model, base, partial)


def save_checkpoint(
    run: Path,
    model: Any,
    source: Path,
    optimizer: torch.optim.Optimizer,
    step: int,
    trained: Mapping[str, Any] | None = None,
) -> None:
    """`checkpoints/step-N` of a run folder: the model in the dtype it is trained in, or of one with adapters
    these alone, and what `load_checkpoint` needs besides.

    trained: the options that decide which tensors there are, see `resume.layout_of`. They are kept with the
    checkpoint in `optimizer/step.json`, beside a CRC-32 of each other file.
    """
    with whole_or_absent(run / "checkpoints" / f"step-{step:06d}") as partial:
        sums: dict[str, int] = {}
        if has_adapters(model):
            write_adapters(model, str(source.resolve()), partial)
        else:
            sums = write_model(model, source, partial, model.dtype)
        (partial / "optimizer").mkdir()
        sums[STATE] = write_tensors(partial / STATE, state_tensors(optimizer))
        names = [
            file.relative_to(partial).as_posix() for file in sorted(partial.rglob("*")) if file.is_file()
        ]
        listed = {name: f"{sums[name] if name in sums else crc_of(partial / name):08x}" for name in names}
        (partial / STEP).write_text(json.dumps({"step": step, "trained": trained, "crc32": listed}, indent=2))


def checkpoints(run: Path) -> list[tuple[Path, int]]:
    """The checkpoints of a run folder with the number of steps in their names, the fewest first."""
    found = [(folder, NAMED.fullmatch(folder.name)) for folder in (run / "checkpoints").glob("step-*")]
    return sorted(
        ((folder, int(match[1])) for folder, match in found if match and folder.is_dir()),
        key=lambda entry: entry[1],
    )


def latest_checkpoint(run: Path) -> tuple[Path, int]:
    """The checkpoint of a run folder with the most steps, and their number. Raises UserError if there is
    none, or if it says otherwise itself."""
    if not (found := checkpoints(run)):
        more = f": start a new run with --model {run / 'final'}" if (run / "final").is_dir() else ""
        raise UserError(f"--resume {run}: there is no checkpoint in its folder `checkpoints`{more}.")
    folder, step = found[-1]
    if (said := _note(folder).get("step")) != step or isinstance(said, bool):
        raise damaged(folder, f"{STEP} says step {said!r}")
    return folder, step


def _note(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    try:
        return dict(json.loads((folder / STEP).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise damaged(folder, f"{STEP}: {reason(error)}") from None


def trained_with(folder: Path) -> dict[str, Any] | None:
    """The options that decided which tensors a checkpoint has; None for one that does not say."""
    trained = _note(folder).get("trained")
    return trained if isinstance(trained, dict) else None


def verify_checkpoint(folder: Path) -> None:
    """Raises UserError unless each file of a checkpoint is as it was written. One that has no checksums is
    taken as it is."""
    listed = _note(folder).get("crc32", {})
    if not isinstance(listed, dict):
        raise damaged(folder, f"{STEP} has no list of checksums")
    for name, crc in listed.items():
        try:
            found = f"{crc_of(folder / name):08x}"
        except (OSError, ValueError) as error:
            raise damaged(folder, f"{name}: {reason(error)}") from None
        if found != crc:
            raise damaged(folder, f"{name} is not what was written, by its checksum")


def load_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved weights and optimizer state in place. Raises UserError if they are not whole, not finite
    or not of this model and optimizer."""
    try:
        load_saved_weights(folder, model)
        tensors = load_file(folder / STATE)
    except (UserError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise damaged(folder, reason(error)) from None
    try:
        load_state_tensors(optimizer, tensors)
    except (ValueError, KeyError, RuntimeError) as error:
        advice = (
            "resume with the --optimizer, --lr-scale and --dtype that it was trained with, or start a new "
            f"run with --model {folder}"
        )
        raise UserError(f"{folder}: {error}: {advice}.") from None
    states = ((f"{STATE}: {name}", tensor) for name, tensor in state_tensors(optimizer).items())
    if name := first_not_finite([*model.named_parameters(), *states]):
        raise damaged(folder, f"{name} holds values that are not finite")


def load_saved_weights(folder: Path, model: Any) -> None:
    """A checkpoint's weights, or its adapters where the model has some."""
    (load_adapters if has_adapters(model) else load_weights)(folder, model)


def damaged(folder: Path, what: str) -> UserError:
    """For a checkpoint that is of no use: what is wrong with it, and what there is instead."""
    steps = {other.name: step for other, step in checkpoints(folder.parent.parent)}
    earlier = [name for name, step in steps.items() if step < steps.get(folder.name, 0)]
    advice = (
        f"remove it to resume from {earlier[-1]}"
        if earlier
        else "there is no earlier one, so start a new run"
    )
    return UserError(f"{folder} is not a whole checkpoint ({what}): {advice}.")
