"""What is asked, the coordinate frame each model family answers in, and a task's tokens, positions and patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from locus_kernels.patchify import patchify
from torch import Tensor

from locus_fast.errors import UserError
from locus_fast.preprocess import PatchSpec, resize
from locus_fast.types import Example, Prompt

# The recipe's wording is a fact of the paper; "{units}" is "pixel coordinates" there.
THINK = (
    "Image 1 is a full scene image. Image 2 is a cropped region from Image 1. Please find where Image 2 is located in Image 1, "
    "and output the bounding box as [x1, y1, x2, y2] in {units}. First think inside <think> </think>, then give the answer inside "
    "<answer> </answer>, that is: <think> reasoning </think><answer> [x1, y1, x2, y2] </answer>."
)
DIRECT = "Answer with the bounding box [x1, y1, x2, y2] of the second image in the first, in {units}."
QUESTIONS = {"think": THINK, "direct": DIRECT}
GRAMMAR = {"think": "think_answer", "direct": "direct"}  # the reply structure that the format reward asks for
WHICH_BOX = {"think": "answer", "direct": "first"}  # the box that counts


@dataclass(frozen=True)
class Frame:
    """How a family speaks of a place: pixels of the resized image (extent None), or 0 to `extent` across the image."""

    extent: int | None

    @property
    def units(self) -> str:
        return "pixel coordinates" if self.extent is None else f"coordinates from 0 to {self.extent} relative to its size"

    def scale(self, size: tuple[int, int], resized: tuple[int, int]) -> np.ndarray:
        """Frame units per pixel of the original image, float64 [4] for xyxy. size, resized: (width, height) before and after the resize."""
        spoken = resized if self.extent is None else (self.extent, self.extent)
        return np.array([spoken[i % 2] / size[i % 2] for i in range(4)])


@dataclass(frozen=True)
class Family:
    """What a model family adds to the architecture in `transformers`. To add one: a line in FAMILIES, keyed by its config's `model_type`."""

    extent: int | None


FAMILIES = {"qwen2_5_vl": Family(extent=None), "qwen3_vl": Family(extent=1000)}


def frame_of(config: Any) -> Frame:
    """The frame of a model, from its config: the family's, unless the config names its own `coordinate_extent`."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(f"model type '{config.model_type}' is not one of the families that can be trained: {', '.join(sorted(FAMILIES))}.")
    return Frame(getattr(config, "coordinate_extent", family.extent))


def question_pieces(tokenizer: Any, question: str, frame: Frame, placeholder: int) -> tuple[list[int], list[int], list[int]]:
    """The token ids before, between and after the two images, by the tokenizer's chat template. UserError if it has no place for two images."""
    text = QUESTIONS[question].format(units=frame.units)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": text}]}]
    try:
        ids = list(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"])
    except ValueError:
        raise UserError("the model's folder has no chat template: copy the base model's chat_template.jinja, or its tokenizer_config.json.") from None
    if (found := ids.count(placeholder)) != 2:
        raise UserError(f"the tokenizer's chat template gives {found} image placeholders for two images; it must give one each.")
    first = ids.index(placeholder)
    second = ids.index(placeholder, first + 1)
    return ids[:first], ids[first + 1 : second], ids[second + 1 :]


class Prompter:
    """Turns examples into prompts for one model. The question is the same every time, so its tokens are made once."""

    def __init__(self, tokenizer: Any, config: Any, spec: PatchSpec, *, question: str, image_pixels: tuple[int, int], cue_pixels: tuple[int, int]):
        """image_pixels, cue_pixels: fewest and most pixels of the resized image and cue."""
        self.frame, self.spec = frame_of(config), spec
        self.pixels = (image_pixels, cue_pixels)
        self.placeholder = config.image_token_id
        self.pieces = question_pieces(tokenizer, question, self.frame, self.placeholder)
        opened = tokenizer.decode(self.pieces[2]).rstrip().endswith("<think>")  # a thinking model's template may begin the reply itself
        self.opening: list[int] = tokenizer.encode("<think>", add_special_tokens=False) if opened else []

    def __call__(self, example: Example) -> Prompt:
        """The prompt of an example."""
        images = [
            resize(pixels, factor=self.spec.factor, min_pixels=least, max_pixels=most)
            for pixels, (least, most) in zip((example.image, example.cue), self.pixels, strict=True)
        ]
        grids = [(1, image.shape[0] // self.spec.patch, image.shape[1] // self.spec.patch) for image in images]
        ids, position = interleave(self.pieces, [(h // self.spec.merge, w // self.spec.merge) for _, h, w in grids], self.placeholder)
        size = (example.image.shape[1], example.image.shape[0])
        scale = self.frame.scale(size, (images[0].shape[1], images[0].shape[0]))
        return Prompt(
            ids=ids,
            position=position,
            patches=torch.cat([self.patches(image) for image in images]),
            grids=torch.tensor(grids),
            target=torch.tensor(np.array(example.box) * scale, dtype=torch.float32),
            scale=torch.tensor(scale, dtype=torch.float32),
            size_class=example.size_class,
            source=example.source,
            skipped=example.skipped,
        )

    def patches(self, image: np.ndarray) -> Tensor:
        spec = self.spec
        writable = torch.from_numpy(np.ascontiguousarray(image).copy())
        return patchify(writable, patch=spec.patch, frames=spec.frames, merge=spec.merge, mean=spec.mean, std=spec.std)


def interleave(pieces: Sequence[Sequence[int]], cells: Sequence[tuple[int, int]], placeholder: int) -> tuple[Tensor, Tensor]:
    """Token ids and multimodal rotary positions of text pieces with an image between each two.

    cells: (rows, columns) of language tokens of each image. Returns ids int64 [P] and position int64 [3, P] (temporal, row, column): text counts
    up by one on all three axes; an image stands at the next free index plus its row and column; text goes on past its longer side
    (Qwen2-VL, arXiv 2409.12191, section 2.1).
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
