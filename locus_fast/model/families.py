"""The model families: one record each, which every other module asks.

To add a family, add an entry to `FAMILIES` under its config's `model_type`. A family with the modules of one
that is here names that `Architecture` and what differs in how it is asked; one with modules of its own needs
an `Architecture` record besides, and where its code in `transformers` differs by more than the record says,
code that reads the new trait. One whose `model_type` is not known to `transformers` names the model type
whose classes it uses. The rest is read from a checkpoint's own files: sizes and the placeholder's id from
config.json, normalisation from the processor's config, the turns of a conversation and a thinking model's
opening from its chat template.

Other modules name a module, a family or a placeholder too, and need no change for another entry of a known
architecture; one with other modules would be looked for in them: `cost/shapes.py` and `cost/traffic.py` (what
is counted), `model/attention.py`, `model/policy.py`, `model/fused.py`, `model/quantize.py`,
`model/reference.py` and `model/adapter_files.py` (what is switched, kept or named), `step/rollout.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locus_fast.cost.shapes import ModelShape, TextShape, VisionShape
from locus_fast.data.resize import resize
from locus_fast.errors import UserError

PARTS = ("vision", "projector", "language")  # of a model, each with a learning rate of its own


@dataclass(frozen=True)
class Frame:
    """How a family speaks of a place: pixels of the resized image (extent None), or 0 to `extent` across the
    image."""

    extent: int | None

    @property
    def units(self) -> str:
        return (
            "pixel coordinates"
            if self.extent is None
            else f"coordinates from 0 to {self.extent} relative to its size"
        )

    def scale(self, size: tuple[int, int], resized: tuple[int, int]) -> np.ndarray:
        """Frame units per pixel of the original image, float64 [4] for xyxy. size, resized: (width, height)
        before and after the resize."""
        spoken = resized if self.extent is None else (self.extent, self.extent)
        return np.array([spoken[i % 2] / size[i % 2] for i in range(4)])


def interleave(
    pieces: Sequence[Sequence[int]], cells: Sequence[tuple[int, int]], placeholder: int
) -> tuple[Tensor, Tensor]:
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
class Architecture:
    """How a family's modules in `transformers` are built, beyond what its config says."""

    name: str  # in the cost ledger's table of kernel launches
    gated_vision: bool  # the tower's MLPs have a gate, and its norms are RMSNorms
    windows: bool  # most blocks of the tower attend within windows
    deepstack: bool  # states of some blocks are added to the first language layers
    position_table: bool  # the tower has a learned position table
    qk_norm: bool  # queries and keys are normalised, and biased only where the config says so
    free_head_dim: bool  # the config may state a head dimension other than hidden_size / num_attention_heads
    interleaved_rotary: bool  # every third frequency is of one axis; else those of an axis are together
    rotary_sections: tuple[int, int, int]  # frequencies of the three axes where a config gives none
    projector: tuple[str, ...]  # names, inside the tower, of the modules that project to the language model


QWEN2_5_VL = Architecture(
    name="qwen2_5_vl",
    gated_vision=True,
    windows=True,
    deepstack=False,
    position_table=False,
    qk_norm=False,
    free_head_dim=False,
    interleaved_rotary=False,
    rotary_sections=(16, 24, 24),
    projector=("merger",),
)
QWEN3_VL = Architecture(
    name="qwen3_vl",
    gated_vision=False,
    windows=False,
    deepstack=True,
    position_table=True,
    qk_norm=True,
    free_head_dim=True,
    interleaved_rotary=True,
    rotary_sections=(24, 20, 20),
    projector=("merger", "deepstack_merger_list"),
)


@dataclass(frozen=True)
class Family:
    """One model family."""

    architecture: Architecture
    extent: int | None  # coordinate frame: see Frame
    classes: str = ""  # the model type whose classes in `transformers` it uses; empty: its own
    resize: Callable[..., np.ndarray] = resize  # rule: (image, *, factor, min_pixels, max_pixels) -> image
    placeholder: str = (
        "image_token_id"  # the config's name for the id that stands for every language token of an image
    )
    positions: Callable[..., tuple[Tensor, Tensor]] = (
        interleave  # rule: (pieces, cells, placeholder) -> ids, position
    )
    stop: str = "<|im_end|>"  # ends a turn: replies stop at it, besides what generation_config.json names
    thinking: str = "<think>"  # a template whose generation prompt ends in it has begun the reply's thinking


# MiMo-VL is a Qwen2.5-VL by its config, and speaks of pixels too; its template, tokenizer and sizes are in
# its folder.
FAMILIES = {
    "qwen2_5_vl": Family(QWEN2_5_VL, extent=None),
    "qwen3_vl": Family(QWEN3_VL, extent=1000),
}


def family_of(config: Any) -> Family:
    """The family of a model, from its config as `read_config` gives it; UserError if there is none."""
    return family_named(getattr(config, "family", config.model_type))


def family_named(model_type: object) -> Family:
    """The family of a config's `model_type`; UserError if there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"model type '{model_type}' is not one of the families that can be trained: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def read_config(folder: Path) -> Any:
    """`transformers`' configuration of the model in a folder. One of a family that uses another model type's
    classes is of that type, and has its own in the attribute `family`. Raises what `transformers` raises."""
    from transformers import AutoConfig  # takes seconds, and published shapes need no `transformers`

    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = stated.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or not family.classes:
        return AutoConfig.from_pretrained(folder)
    return AutoConfig.for_model(**{**stated, "model_type": family.classes, "family": name})


def frame_of(config: Any) -> Frame:
    """The frame of a model, from its config: the family's, unless the config names its own
    `coordinate_extent`."""
    return Frame(getattr(config, "coordinate_extent", family_of(config).extent))


def shape_of(config: Any) -> ModelShape:
    """The dimensions of a model for the cost ledger, from its config. Raises UserError for an unknown
    family."""
    kind, text, vision = family_of(config).architecture, config.text_config, config.vision_config
    head_dim = getattr(text, "head_dim", None) if kind.free_head_dim else None
    return ModelShape(
        kind.name,
        VisionShape(
            depth=vision.depth,
            hidden=vision.hidden_size,
            heads=vision.num_heads,
            intermediate=vision.intermediate_size,
            out=vision.out_hidden_size,
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            frames=vision.temporal_patch_size,
            channels=vision.in_channels,
            gated=kind.gated_vision,
            window=vision.window_size if kind.windows else 0,
            full=tuple(vision.fullatt_block_indexes) if kind.windows else (),
            deepstack=tuple(vision.deepstack_visual_indexes) if kind.deepstack else (),
            positions=vision.num_position_embeddings if kind.position_table else 0,
        ),
        TextShape(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=head_dim or text.hidden_size // text.num_attention_heads,
            intermediate=text.intermediate_size,
            vocabulary=text.vocab_size,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=bool(text.attention_bias) if kind.qk_norm else True,
            qk_norm=kind.qk_norm,
        ),
    )


def part_of(name: str, family: Family) -> str:
    """The part, one of `PARTS`, that a parameter belongs to by its name, which may have a prefix (adapters
    wrap the model)."""
    words = name.split(".")
    if "visual" not in words:
        return "language"
    return "projector" if {*words} & {*family.architecture.projector} else "vision"


def held_name(stored: str, names: Container[str]) -> str | None:
    """The model's name of what a checkpoint calls `stored`, None if the model has none: `transformers` put
    the vision tower and the language model under `model` in 4.52, after the Qwen2.5-VL checkpoints were
    published."""
    for name in (stored, f"model.{stored}", f"model.language_model.{stored.removeprefix('model.')}"):
        if name in names:
            return name
    return None
