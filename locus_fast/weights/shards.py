"""The published layout of a model's folder: which files hold its weights, which stored tensor is which of the
model's, and the way back.

What is written has the same files, the same tensors in each at the same places, and the same bytes where the
model's values are the source's. The safetensors format (a length, a JSON header, the tensors' bytes) is
written here, so that never more than a tensor or two are in host memory.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from locus_fast.errors import UserError
from locus_fast.files import SummedFile
from locus_fast.model.adapters import merged_state
from locus_fast.model.families import held_name

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# an optimizer's state has integers besides
STATE_CODES = {
    **CODES,
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}
# they would be the base's, so never copied
OTHER_WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: the one, else the shards that the index names. UserError if there are
    none or the index cannot be read."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    index = folder / INDEX
    if not index.is_file():
        raise UserError(_without_weights(folder))
    try:
        content = json.loads(index.read_text())
        dict(content["metadata"])  # which transformers reads
        names = sorted({str(name) for name in content["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} cannot be read as the index of a model's shards ({type(error).__name__}: {error}): "
            "fetch it again."
        ) from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(
                f"{index} names the shard {name}, which is not in the folder: fetch the model again."
            )
    return [folder / name for name in names]


def _without_weights(folder: Path) -> str:
    """The sentence for a folder with neither of the two files."""
    if pickled := sorted(file.name for file in folder.glob("pytorch_model*.bin")):
        call = "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[1])"
        code = f"import sys; from transformers import AutoModelForImageTextToText as M; {call}"
        command = f'python -c "{code}" {shlex.quote(str(folder))}'
        return (
            f"{folder} has its weights in pickle format ({pickled[0]}), which is never loaded as it may run "
            f"code; convert them with: {command}"
        )
    others = sorted(file.name for file in folder.iterdir() if file.suffix in OTHER_WEIGHTS)
    found = f" (there is {others[0]})" if others else ""
    return (
        f"{folder} has neither {WHOLE} nor {INDEX}{found}: give the folder of a model in Hugging Face "
        "layout, with all of its files."
    )


def read_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """(header, its bytes) of a safetensors file: for each tensor dtype, shape and data_offsets, and perhaps
    `__metadata__`. UserError if damaged."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            raw = stream.read(length) if length <= size else b""
        header = dict(json.loads(raw))
        at = 0
        for entry in sorted(
            (entry for name, entry in header.items() if name != "__metadata__"),
            key=lambda entry: entry["data_offsets"],
        ):
            start, end = entry["data_offsets"]
            if start != at or (
                entry["dtype"] in DTYPES
                and end - start != math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
            ):
                raise ValueError
            at = end
        if size != 8 + len(raw) + at:
            raise ValueError
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}): correct its permissions, or fetch it again."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(_damaged(file)) from None
    return header, raw


def _damaged(file: Path) -> str:
    with file.open("rb") as stream:
        pointer = stream.read(20) == b"version https://git-"
    if pointer:
        return f"{file} is a pointer of Git LFS and not the weights: run `git lfs pull` in its folder."
    return f"{file} is no whole safetensors file; it is cut short or damaged: fetch it again."


def read_headers(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Each stored tensor of a model with its file and header entry. UserError if any is stored in a type that
    is not trained: a quantised model."""
    entries = {
        name: (file, entry)
        for file in weight_files(folder)
        for name, entry in read_header(file)[0].items()
        if name != "__metadata__"
    }
    for name, (file, entry) in entries.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{file}: {name} is stored as {entry['dtype']}; give the model's unquantised checkpoint "
                f"({', '.join(CODES.values())})."
            )
    if not entries:
        raise UserError(f"{folder}: its weight files hold no tensors; fetch the model again.")
    return entries


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a model's first stored tensor."""
    return DTYPES[next(iter(read_headers(folder).values()))[1]["dtype"]]


@torch.no_grad()
def load_weights(folder: Path, model: Any) -> None:
    """Copy the weights of a folder into a model, one tensor at a time. UserError if they are not those of
    this model."""
    state = model.state_dict()
    missing = {_identity(tensor) for tensor in state.values()}
    for file in weight_files(folder):
        with safe_open(file, framework="pt", device=str(model.device)) as shard:
            for stored in shard.keys():  # noqa: SIM118, not a dictionary
                if (name := held_name(stored, state)) is None:
                    continue
                value = shard.get_tensor(stored)
                if value.shape != state[name].shape:
                    raise UserError(
                        f"{file}: {stored} has shape {list(value.shape)}, and the model's "
                        f"{list(state[name].shape)}."
                    )
                state[name].copy_(value)
                missing.discard(_identity(state[name]))
    if missing:
        raise UserError(f"{folder}: {len(missing)} of the model's tensors are missing from its weights.")


def _identity(tensor: Tensor) -> tuple[int, torch.Size]:
    """The same for tied weights."""
    return tensor.data_ptr(), tensor.shape


@torch.no_grad()
def write_model(model: Any, source: Path, folder: Path, dtype: torch.dtype | None) -> dict[str, int]:
    """The model into the existing folder as `source` lies: its files, names and shards, everything but the
    weights copied as it stands.

    dtype: of the written tensors; None for those they have in `source`. Where they differ, config.json and
    the index say so. A stored tensor that the model does not hold is copied; of tied weights each that is
    stored gets the common value. Adapters are merged into what they adapt. Returns the CRC-32 of each file of
    weights.
    """
    state, files = merged_state(model), weight_files(source)
    sizes, changed, sums = zip(
        *(_write_weights(state, file, folder / file.name, dtype) for file in files), strict=True
    )
    for file in source.iterdir():
        unused_index = file.name == INDEX and files == [source / WHOLE]
        if file.is_file() and file.suffix not in OTHER_WEIGHTS and not unused_index:
            shutil.copyfile(file, folder / file.name)
    if any(changed):
        config = folder / "config.json"
        config.write_text(
            re.sub(
                r'("(?:torch_)?dtype":\s*)"\w+"',
                rf'\1"{str(dtype).removeprefix("torch.")}"',
                config.read_text(),
            )
        )
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text())
            index["metadata"] = {**index.get("metadata", {}), "total_size": sum(sizes)}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return {file.name: crc for file, crc in zip(files, sums, strict=True)}


def _write_weights(
    state: Mapping[str, Tensor], source: Path, target: Path, dtype: torch.dtype | None
) -> tuple[int, bool, int]:
    """One safetensors file; returns the bytes of its tensors, whether any has another dtype than in the
    source, and the file's CRC-32."""
    header, raw = read_header(source)
    entries = {
        name: header[name]
        for name in sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    }
    new = _with_dtype(entries, {name for name in entries if held_name(name, state)}, dtype)
    text = raw
    if new != entries:
        text = json.dumps({**header, **new}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
    with safe_open(source, framework="pt") as reader, SummedFile(target) as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            held = held_name(name, state)
            value = state[held].detach().cpu() if held else reader.get_tensor(name)
            if value.dtype != DTYPES[entry["dtype"]] and torch.equal(
                (stored := reader.get_tensor(name)).to(value.dtype), value
            ):
                value = stored  # not trained, so not rounded to the dtype of training either
            value = value.to(DTYPES[new[name]["dtype"]]).contiguous()
            writer.write(value.flatten().view(torch.uint8).numpy().data)
    return max((entry["data_offsets"][1] for entry in new.values()), default=0), new != entries, writer.crc


def _with_dtype(entries: dict[str, Any], held: set[str], dtype: torch.dtype | None) -> dict[str, Any]:
    """The header's entries with the tensors in `held` in another dtype, the offsets moved accordingly."""
    new: dict[str, Any] = {}
    at = 0
    for name, entry in entries.items():
        code = CODES[dtype] if dtype and name in held else entry["dtype"]
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        if code != entry["dtype"]:
            size = size // DTYPES[entry["dtype"]].itemsize * DTYPES[code].itemsize
        new[name] = {**entry, "dtype": code, "data_offsets": [at, at + size]}
        at += size
    return new


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> int:
    """A safetensors file of these tensors, of which one at a time is in host memory; returns the file's
    CRC-32."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each is aligned
    header: dict[str, Any] = {}
    at = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": STATE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with SummedFile(file) as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            writer.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return writer.crc
