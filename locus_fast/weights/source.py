"""A model's folder before its weights are read: whether its files are whole and belong together.

Weights are judged by their headers and by a model without memory, so a folder of any size is known to be good
or bad in about a second.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from locus_fast.errors import UserError, reason
from locus_fast.libraries import quiet_transformers
from locus_fast.model.adapter_files import CONFIG as ADAPTERS
from locus_fast.model.adapter_files import Pair
from locus_fast.model.families import family_named, family_of, held_name, read_config
from locus_fast.model.preprocess import PatchSpec
from locus_fast.model.processor import own_limits
from locus_fast.model.quantize import language_linears, linear_names
from locus_fast.model.switches import check_switches
from locus_fast.weights.shards import read_headers


@dataclass(frozen=True)
class Source:
    """A folder in which `read_source` found nothing wrong."""

    folder: Path
    config: Any  # transformers' configuration
    tokenizer: Any
    spec: PatchSpec
    limits: tuple[int, int]  # the fewest and most pixels that its own image processor resizes to
    linears: dict[str, tuple[int, int]]  # (out, in) of each layer that can have an adapter
    adapters: dict[str, Pair] = field(default_factory=dict)  # those that --model holds, whose base this is


def read_source(folder: Path) -> Source:
    """What there is to know of a model before its weights are read. Raises UserError, naming the file and
    what to do, for a model that cannot be loaded whole: of another family, quantised, pickled, with shards
    that are absent, damaged or another model's, or with a tokenizer of another model."""
    quiet_transformers()
    check_config(folder)
    headers = read_headers(folder)
    file, config = folder / "config.json", None
    try:
        config = read_config(folder)
        with torch.device("meta"):
            # which writes the dtype into its config
            model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    except (
        Exception
    ) as error:  # sizes that do not fit together raise anything from TypeError to ZeroDivisionError
        if config is not None:
            check_switches(file, config)
        raise UserError(
            f"{file} does not describe a model ({reason(error)}): copy the base model's."
        ) from None
    _check_tensors(folder, headers, model)
    check_switches(file, config)
    tokenizer = load_tokenizer(folder)
    _check_tokens(folder, config, tokenizer)
    names = linear_names(model)
    linears = {
        names[id(linear)]: (linear.out_features, linear.in_features)
        for _, _, linear in language_linears(model)
    }
    return Source(folder, config, tokenizer, PatchSpec.of(config, folder), own_limits(folder), linears)


def check_config(folder: Path) -> None:
    """Raises UserError unless config.json says that the folder holds an unquantised model of a known
    family."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json: give the folder of a model in Hugging Face layout.")
    if (folder / ADAPTERS).is_file():  # transformers would put them on the model in silence
        raise UserError(
            f"{folder} holds a model and adapters ({ADAPTERS}): move one of the two to a folder of its own."
        )
    stated = read_json(file)
    try:
        family_named(stated.get("model_type"))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if stated.get("quantization_config"):
        raise UserError(f"{file} has a quantization_config: give the model's unquantised checkpoint.")
    if not isinstance(stated.get("vision_config"), dict) or not stated["vision_config"]:
        raise UserError(
            f"{file} has no vision_config: give a vision-language model, or copy the base model's "
            "config.json."
        )


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({reason(error)}): copy the base model's.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object: copy the base model's.")
    return content


def _check_tensors(folder: Path, headers: dict[str, tuple[Path, dict[str, Any]]], model: Any) -> None:
    """Raises UserError unless each of the model's tensors is stored, in its shape."""
    state = model.state_dict(keep_vars=True)
    missing = {id(tensor): name for name, tensor in reversed(state.items())}  # tied weights are one
    for stored, (file, entry) in headers.items():
        if name := held_name(stored, state):
            if entry["shape"] != list(state[name].shape):
                wanted = f"{list(state[name].shape)} by config.json"
                raise UserError(
                    f"{file}: {stored} has shape {entry['shape']}, and should have {wanted}: one of the two "
                    "is another model's."
                )
            missing.pop(id(state[name]), None)
    if missing:
        first = min(missing.values())
        raise UserError(
            f"{folder}: {len(missing)} of the model's tensors are in none of its weight files, the first "
            f"{first}: fetch the model again."
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. Its chat template is the one that a processor would take:
    chat_template.jinja, else chat_template.json, else the tokenizer's own."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json: copy the tokenizer's files of the base model there."
        )
    template = folder / "chat_template.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise UserError(
            f"{folder}: its tokenizer could not be loaded ({reason(error)}): copy the base model's files."
        ) from None
    if template.is_file() and not (folder / "chat_template.jinja").is_file():
        tokenizer.chat_template = read_json(template).get("chat_template")
        if not isinstance(tokenizer.chat_template, str):
            raise UserError(f"{template} has no text chat_template: copy the base model's.")
    return tokenizer


def _check_tokens(folder: Path, config: Any, tokenizer: Any) -> None:
    """Raises UserError unless tokenizer, config and generation config mean the same ids, all of which the
    embedding has."""
    rows, family = config.get_text_config().vocab_size, family_of(config)
    highest, remedy = (
        max(tokenizer.get_vocab().values()),
        "copy the tokenizer's files of the base model there",
    )
    if highest >= rows:
        raise UserError(
            f"{folder}: its tokenizer has ids up to {highest}, and the model's embedding has {rows} rows: "
            f"{remedy}."
        )
    image = getattr(config, family.placeholder)
    if image not in tokenizer.added_tokens_decoder:
        raise UserError(
            f"{folder}: config.json has {family.placeholder} {image}, which is no special token of its "
            f"tokenizer: {remedy}."
        )
    generation = folder / "generation_config.json"
    stops = read_json(generation).get("eos_token_id") if generation.is_file() else None
    for stop in stops if isinstance(stops, list) else [] if stops is None else [stops]:
        if not isinstance(stop, int) or not 0 <= stop < rows:
            raise UserError(
                f"{generation}: eos_token_id {stop!r} is no id of the model, which has {rows}: copy the "
                "base model's."
            )
