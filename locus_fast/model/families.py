"""What a model family adds to its architecture in `transformers`, one small record each, and the rules that
the records name.

A record says how a family speaks of places and how its prompts are laid out. The rest of that is read from a
checkpoint's own files: patch sizes and the placeholder's id from config.json, normalisation from the
processor's config, the turns of a conversation and a thinking model's opening from its chat template.

A record alone does not add a family. One with the architecture of Qwen2.5-VL or Qwen3-VL under another
`model_type` is also to be made known to `cost/shapes.py` (dimensions, parameters and FLOPs; it refuses what
it does not know), `cost/traffic.py` (kernels that a layer starts) and `switches.py` (settings that are
computed exactly). Another architecture needs changes in these too:

- `packing.py`: what its vision tower derives from the images' grids, and the placeholder's id, `image_token_id`;
- `policy.py`, `rollout.py`, `reference.py`: the parts' names `visual` and `language_model`, how features enter the
  language model's layers, and the decoding step;
- `fused.py`: the modules that have a fused counterpart;
- `quantize.py`, `adapter_files.py`: the linear layers that take adapters and 4-bit weights, and their names;
- `optim.py`: which parameters are of the tower, the projector and the language model (`part_of`);
- `held_name` below: where `transformers` has moved tensors since the checkpoints were published.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locus_fast.errors import UserError
from locus_fast.model.preprocess import resize


@dataclass(frozen=True)
class Frame:
    """How a family speaks of a place: pixels of the resized image (extent None), or 0 to `extent` across the
    image."""

    extent: int | None

    @property
    def units(self) -> str:
        return "pixel coordinates" if self.extent is None else f"coordinates from 0 to {self.extent} relative to its size"

    def scale(self, size: tuple[int, int], resized: tuple[int, int]) -> np.ndarray:
        """Frame units per pixel of the original image, float64 [4] for xyxy. size, resized: (width, height)
        before and after the resize."""
        spoken = resized if self.extent is None else (self.extent, self.extent)
        return np.array([spoken[i % 2] / size[i % 2] for i in range(4)])


def interleave(pieces: Sequence[Sequence[int]], cells: Sequence[tuple[int, int]], placeholder: int) -> tuple[Tensor, Tensor]:
    """Token ids and multimodal rotary positions of text pieces with an image between each two.

    cells: (rows, columns) of language tokens of each image. Returns ids int64 [P] and position int64 [3, P]
    (temporal, row, column): text counts up by one on all three axes; an image stands at the next free index
    plus its row and column; text goes on past its longer side (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    ids: list[int] = []
    position: list[Tensor] = []
    at = 0
    for index, piece in enumerate(pieces):
        ids += piece
        position.append((torch.arange(len(piece)) + at).expand(3, -1))
        at += len(piece)
        if index < len(cells):
            rows, columns = cells[index]
            ids += [placeholder] * (rows * columns)
            place = torch.zeros(rows * columns, dtype=torch.int64)
            row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
            position.append(torch.stack([place, row, column]) + at)
            at += max(rows, columns)
    return torch.tensor(ids), torch.cat(position, 1)


@dataclass(frozen=True)
class Family:
    """One model family."""

    extent: int | None  # coordinate frame: see Frame
    resize: Callable[..., np.ndarray] = resize  # resize rule: (image, *, factor, min_pixels, max_pixels) -> image
    placeholder: str = "image_token_id"  # the config's name for the id that stands once for every language token of an image
    positions: Callable[..., tuple[Tensor, Tensor]] = interleave  # position rule: (pieces, cells, placeholder) -> ids, position
    stop: str = "<|im_end|>"  # ends a turn: replies stop at it, besides what generation_config.json names
    thinking: str = "<think>"  # a template whose generation prompt ends in it has begun the reply's thinking


# MiMo-VL is a Qwen2.5-VL by its config, and speaks of pixels too; its template, tokenizer and sizes are in its folder.
FAMILIES = {"qwen2_5_vl": Family(extent=None), "qwen3_vl": Family(extent=1000)}


def family_of(config: Any) -> Family:
    """The family of a model, from its config; UserError if there is none."""
    return family_named(config.model_type)


def family_named(model_type: object) -> Family:
    """The family of a config's `model_type`; UserError if there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model type '{model_type}' is not one of the families that can be trained: {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[model_type]


def frame_of(config: Any) -> Frame:
    """The frame of a model, from its config: the family's, unless the config names its own
    `coordinate_extent`."""
    return Frame(getattr(config, "coordinate_extent", family_of(config).extent))


def held_name(stored: str, names: Container[str]) -> str | None:
    """The model's name of what a checkpoint calls `stored`, None if the model has none: `transformers` put
    the vision tower and the language model under `model` in 4.52, after the Qwen2.5-VL checkpoints were
    published."""
    for name in (stored, f"model.{stored}", f"model.language_model.{stored.removeprefix('model.')}"):
        if name in names:
            return name
    return None
