"""A model's folder on photographs: how a run is asked for, and a way to spoil a file of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from locus_fast.weights import shards
from tests.published import PHOTOGRAPHS, write_checkpoint, write_shards

DATA = str(PHOTOGRAPHS / "instances.json")
RECIPE = [
    "--image-pixels",
    "4096",
    "12544",
    "--cue-pixels",
    "1024",
    "3136",
    "--eval-cues",
    "1",
    "--device",
    "cpu",
    "--mix",
    "1",
    "1",
    "1",
]
SIZES = [
    "--steps",
    "1",
    "--prompts",
    "2",
    "--group-size",
    "2",
    "--max-new-tokens",
    "3",
    "--microbatch-tokens",
    "4000",
]
Spoil = Callable[[Path], Any]


def fields(name: str, **changes: Any) -> Spoil:
    """Changes fields of a JSON file; None takes one away."""

    def spoil(folder: Path) -> None:
        content = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(
            json.dumps({key: value for key, value in content.items() if value is not None})
        )

    return spoil


FIRST, SECOND, INDEX = (
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model.safetensors.index.json",
)


def text(name: str, content: str | bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def absent(*names: str) -> Spoil:
    return lambda folder: [file.unlink() for name in names for file in folder.glob(name)]


def entry(**changes: Any) -> Spoil:
    """Changes a tensor's entry in the first shard's header; None takes a field away."""

    def spoil(folder: Path) -> None:
        header, raw = shards.read_header(folder / FIRST)
        changed = {**header["lm_head.weight"], **changes}
        header["lm_head.weight"] = {key: value for key, value in changed.items() if value is not None}
        new = json.dumps(header).encode()
        (folder / FIRST).write_bytes(
            len(new).to_bytes(8, "little") + new + (folder / FIRST).read_bytes()[8 + len(raw) :]
        )

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        stored = {
            name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
        }
        change(stored)
        write_shards(folder, stored, 3)

    return spoil


def template(content: str) -> Spoil:
    """chat_template.jinja stands before chat_template.json."""
    return text("chat_template.jinja", content)


def pickled(folder: Path) -> None:
    stored = {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    absent("*.safetensors*")(folder)
    torch.save(stored, folder / "pytorch_model.bin")


def fewer_rows(folder: Path) -> None:
    fields("config.json", vocab_size=400)(folder)
    tensors(
        lambda stored: stored.update(
            {name: t[:400].contiguous() for name, t in stored.items() if len(t) > 400}
        )
    )(folder)


def of_another_family(folder: Path) -> None:
    absent("*.safetensors*")(folder)
    for file in write_checkpoint(folder.parent / "other", "qwen3-vl").glob("*.safetensors*"):
        file.rename(folder / file.name)
