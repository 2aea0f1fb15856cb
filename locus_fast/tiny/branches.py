"""Training rows of the base: a scene's image tokens once, then one branch a cue (its tokens, the question,
the reply), kept apart by a mask.

Tokens and positions are those of `prompts.py`; sharing the image makes six questions cost little more than
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from locus_kernels.patchify import patchify
from torch import Tensor

from locus_fast.data.resize import resize
from locus_fast.model.families import Frame, interleave
from locus_fast.model.preprocess import PatchSpec
from locus_fast.model.prompts import PROMPT_STYLES, question_pieces
from locus_fast.tiny.model import CELL, EXTENT, MERGE, PATCH
from locus_fast.tiny.scenes import IMAGE_SIZES, Box, cut_cue, draw_scene

CUE_PIXELS = (32 * 32, 48 * 48)  # fewest and most pixels of a resized cue
REPLY_LENGTH = 14  # "[", two digits, ", ", ... "]", end
DIGITS = [1, 2, 4, 5, 7, 8, 10, 11]  # where a reply's digits stand
SPEC = PatchSpec(PATCH, 2, MERGE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Task:
    """The question's token pieces around the two images, and the ids a reply needs."""

    pieces: tuple[list[int], list[int], list[int]]
    placeholder: int
    stop: int
    tokenizer: Any

    @staticmethod
    def of(tokenizer: Any) -> Task:
        placeholder, stop = (
            tokenizer.convert_tokens_to_ids(token) for token in ("<|image_pad|>", "<|im_end|>")
        )
        return Task(
            question_pieces(tokenizer, PROMPT_STYLES["direct"], Frame(EXTENT), placeholder),
            placeholder,
            stop,
            tokenizer,
        )

    def reply(self, box: tuple[float, ...], size: tuple[int, int]) -> list[int]:
        """The tokens of a box: two digits a number."""
        numbers = [min(EXTENT, max(0, round(v / size[i % 2] * EXTENT))) for i, v in enumerate(box)]
        text = "[" + ", ".join(f"{n:02d}" for n in numbers) + "]"
        return [*self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(text)), self.stop]


@dataclass(frozen=True)
class Branches:
    """S scenes of one size with K cues each. A row is the image's tokens, then K branches of one width, short
    cues padded in front."""

    ids: Tensor  # int64 [S, row]
    position: Tensor  # int64 [3, S, row]
    mask: Tensor  # float32 [S, 1, row, row], added to attention scores
    is_image: Tensor  # bool [S, row]
    patches: Tensor  # float32 [patches, ...], scene by scene: the image, then its cues
    grids: Tensor  # int64 [S * (1 + K), 3]
    predicting: Tensor  # int64 [K * REPLY_LENGTH]: row positions whose state predicts a reply token
    image_span: tuple[int, int]  # where the image's tokens stand in a row
    cells_of_box: Tensor  # float32 [S, K, cells]
    cells_of_edge: Tensor  # float32 [S, K, 4, cells]
    cues: int

    @property
    def target(self) -> Tensor:
        """int64 [S, K * REPLY_LENGTH]"""
        return self.ids[:, self.predicting + 1]


def draw_branches(
    rng: np.random.Generator, task: Task, scenes: int, cues: int, objects: tuple[int, int], loosen: float
) -> Branches:
    """Scenes of one random size with this many objects; replies state the cue's region, enlarged by a random
    factor of up to `loosen`."""
    size = IMAGE_SIZES[int(rng.integers(len(IMAGE_SIZES)))]
    cells = (size[1] // CELL, size[0] // CELL)
    image_start = len(task.pieces[0])
    shared = image_start + cells[0] * cells[1] + 1  # the image and its end token
    width = CUE_PIXELS[1] // CELL**2 + len(task.pieces[1]) - 1 + len(task.pieces[2]) + REPLY_LENGTH
    total = shared + cues * width
    ids = torch.full((scenes, total), task.stop)
    position = torch.zeros(3, scenes, total, dtype=torch.int64)
    real = torch.zeros(scenes, total, dtype=torch.bool)
    boxes = torch.zeros(scenes, cues, 4)
    patches: list[Tensor] = []
    grids: list[tuple[int, int, int]] = []
    for s in range(scenes):
        scene, found = draw_scene(rng, size, objects)
        patches.append(patches_of(scene))
        grids.append((1, cells[0] * MERGE, cells[1] * MERGE))
        order = rng.permutation(len(found))
        for k in range(cues):
            cue, region = cut_cue(rng, scene, found[order[k % len(found)]])
            cue = resize(cue, factor=CELL, min_pixels=CUE_PIXELS[0], max_pixels=CUE_PIXELS[1])
            h, w = cue.shape[0] // CELL, cue.shape[1] // CELL
            patches.append(patches_of(cue))
            grids.append((1, h * MERGE, w * MERGE))
            boxes[s, k] = torch.tensor(region)
            reply = task.reply(loosened(rng, region, size, loosen), size)
            tokens, places = interleave(
                [*task.pieces[:2], task.pieces[2] + reply], [cells, (h, w)], task.placeholder
            )
            ids[s, :shared], position[:, s, :shared], real[s, :shared] = (
                tokens[:shared],
                places[:, :shared],
                True,
            )
            end = shared + (k + 1) * width
            start = end - (len(tokens) - shared)
            ids[s, start:end], position[:, s, start:end], real[s, start:end] = (
                tokens[shared:],
                places[:, shared:],
                True,
            )
    ends = shared + (1 + torch.arange(cues)) * width
    cells_of_box, cells_of_edge = box_cells(boxes, *cells)
    return Branches(
        ids=ids,
        position=position,
        mask=branch_mask(real, shared, width),
        is_image=(ids == task.placeholder) & real,
        patches=torch.cat(patches),
        grids=torch.tensor(grids),
        predicting=(ends[:, None] - REPLY_LENGTH - 1 + torch.arange(REPLY_LENGTH)).flatten(),
        image_span=(image_start, shared - 1),
        cells_of_box=cells_of_box,
        cells_of_edge=cells_of_edge,
        cues=cues,
    )


def branch_mask(real: Tensor, shared: int, width: int) -> Tensor:
    """Causal, without padding, and from a branch only to the shared part and itself: 0 or -1e4, float32 [S,
    1, row, row]. real bool [S, row]."""
    place = torch.arange(real.shape[1])
    branch = torch.where(place < shared, -1, (place - shared) // width)
    seen = (place[None] <= place[:, None]) & ((branch[:, None] == branch[None]) | (branch[None] < 0))
    return torch.where(seen & real[:, None, :], 0.0, -1e4)[:, None]


def patches_of(image: np.ndarray) -> Tensor:
    """Normalised patches of an RGB image."""
    return patchify(
        torch.from_numpy(image.copy()),
        patch=SPEC.patch,
        frames=SPEC.frames,
        merge=SPEC.merge,
        mean=SPEC.mean,
        std=SPEC.std,
    )


def box_cells(box: Tensor, grid_h: int, grid_w: int) -> tuple[Tensor, Tensor]:
    """Which image cells a box touches, and which of these hold its left, top, right and bottom edge.

    box [..., 4] xyxy in pixels. Returns float32 [..., cells] and [..., 4, cells].
    """
    y, x = (
        t.flatten() * CELL for t in torch.meshgrid(torch.arange(grid_h), torch.arange(grid_w), indexing="ij")
    )
    left, top, right, bottom = box[..., None].unbind(-2)
    inside = (x + CELL > left) & (x < right) & (y + CELL > top) & (y < bottom)
    edges = (
        torch.stack([x <= left, y <= top, x + CELL >= right, y + CELL >= bottom], -2) & inside[..., None, :]
    )
    return inside.float(), edges.float()


def loosened(rng: np.random.Generator, box: Box, size: tuple[int, int], most: float) -> tuple[float, ...]:
    """The box with its width and height grown by a random factor of 1 to `most`, clipped to the image; `size`
    is (width, height)."""
    if most <= 1:
        return box
    grow = (rng.uniform(1.0, most) - 1) * np.array([box[2] - box[0], box[3] - box[1]])
    share = rng.uniform(0.3, 0.7, 2)
    low, high = (
        np.maximum(0, np.array(box[:2]) - grow * share),
        np.minimum(size, np.array(box[2:]) + grow * (1 - share)),
    )
    return (*low, *high)
