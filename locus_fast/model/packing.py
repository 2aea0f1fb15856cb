"""Prompts and replies in packed rows, without padding: which groups share a microbatch, and where everything
lies. Made on the host, once a microbatch; no layer and no later step asks the device for a length.

Legend: B prompts (groups), G replies a group, R = B * G rows, N packed prompt tokens, M image tokens among
them, T packed reply tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from locus_kernels.shared_prefix_attention import Packed, Pairs, SharedPrefixLayout, send
from torch import Tensor
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from locus_fast.errors import UserError
from locus_fast.model.families import family_of
from locus_fast.model.preprocess import patches_of
from locus_fast.model.prompts import Prompt


def best_fit(costs: Sequence[float], budget: float) -> list[list[int]]:
    """Bins of at most `budget` for items of these costs, none of which exceeds it: best-fit decreasing, ties
    to the lower index and the older bin.

    Returns the items of each bin in ascending order, bins by their first item: a function of its arguments
    alone.
    """
    bins: list[list[int]] = []
    room: list[float] = []
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        fitting = [b for b in range(len(bins)) if room[b] >= costs[item]]
        if fitting:
            chosen = min(fitting, key=lambda b: (room[b], b))
        else:
            chosen = len(bins)
            bins.append([])
            room.append(budget)
        bins[chosen].append(item)
        room[chosen] -= costs[item]
    return sorted(sorted(items) for items in bins)


def pack(prompts: Sequence[Prompt], costs: Sequence[float], budget: float) -> list[list[int]]:
    """Microbatches of whole groups as indices into `prompts`. costs: of each prompt and its replies, in the
    unit of the budget.

    Raises UserError for a group that does not fit alone.
    """
    for prompt, each in zip(prompts, costs, strict=True):
        if each > budget:
            raise UserError(
                f"{prompt.source}: its prompt of {len(prompt.ids)} tokens, its images and its replies cost "
                f"as much as {each:.0f} tokens, more than "
                f"a microbatch of {budget:.0f}; raise --microbatch-tokens, or lower the most of "
                "--image-pixels, --group-size or --max-new-tokens."
            )
    return best_fit(costs, budget)


@dataclass(frozen=True)
class VisionLayout:
    """What a Qwen vision tower derives from its images' grids, made on the host, so that the tower neither
    loops over images nor reads back."""

    keywords: dict[str, Any]  # precomputed arguments of the tower
    images: Pairs  # each image to itself
    windows: Pairs | None  # each window to itself, in the order that the tower brings its patches into

    @staticmethod
    def of(grids: Tensor, vision: Any, device: torch.device | str) -> VisionLayout:
        """grids: int64 [images, 3] on the host, frames, rows and columns of patches; vision: the tower's
        config."""
        images = Packed.of([h * w for t, h, w in grids.tolist() for _ in range(t)], device)
        keywords: dict[str, Any] = {
            "position_ids": send(get_vision_position_ids(grids, vision.spatial_merge_size), device),
            "cu_seqlens": images.cu_seqlens,
            "max_seqlen": images.longest,
        }
        if (positions := getattr(vision, "num_position_embeddings", None)) is not None:
            indices, weights = get_vision_interpolation_indices_and_weights(
                grids,
                int(positions**0.5),
                "bilinear",
                align_corners=True,
                spatial_merge_size=vision.spatial_merge_size,
            )
            keywords |= {"interp_indices": send(indices, device), "interp_weights": send(weights, device)}
        windows = None
        if (size := getattr(vision, "window_size", None)) is not None:
            index, ends = get_vision_window_index(grids, vision.spatial_merge_size, size, vision.patch_size)
            windows = Packed.of(ends.diff().tolist(), device)
            keywords |= {
                "window_index": send(index, device),
                "cu_window_seqlens": windows.cu_seqlens,
                "max_window_seqlen": windows.longest,
            }
        return VisionLayout(
            keywords,
            Pairs(images, images, causal=False),
            None if windows is None else Pairs(windows, windows, causal=False),
        )

    def pairs(self, cu_seqlens: Tensor) -> Pairs:
        """Those of the layer that was given these offsets."""
        windowed = self.windows is not None and cu_seqlens is self.windows.queries.cu_seqlens
        return self.windows if windowed else self.images  # type: ignore[return-value]


@dataclass(frozen=True)
class PromptBatch:
    """B prompts packed into one row."""

    ids: Tensor  # int64 [N]
    position: Tensor  # int64 [3, N]
    last: Tensor  # int64 [B], the place of each prompt's last token
    image_place: Tensor  # int64 [M], the places of image tokens
    patches: Tensor  # float32 [patches, 3 * frames * patch**2], made on the device
    grids: Tensor  # int64 [images, 3], on the host
    target: Tensor  # float32 [B, 4]
    vision: VisionLayout | None  # None without images
    pairs: Pairs  # each prompt to itself, causally
    prompts: tuple[Prompt, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        return self.pairs.queries.lengths

    @staticmethod
    def of(prompts: Sequence[Prompt], config: Any, device: torch.device | str) -> PromptBatch:
        """config: the model's. All prompts are one Prompter's. Images travel as bytes, once, and become
        patches on the device."""
        packed = Packed.of([len(p.ids) for p in prompts], device)
        ids, grids = (torch.cat([getattr(p, name) for p in prompts]) for name in ("ids", "grids"))
        return PromptBatch(
            ids=send(ids, device),
            position=send(torch.cat([p.position for p in prompts], 1), device),
            last=send(torch.tensor(packed.starts[1:]) - 1, device),
            image_place=send(
                torch.from_numpy(
                    np.flatnonzero(ids.numpy() == getattr(config, family_of(config).placeholder))
                ),
                device,
            ),
            patches=patches_of(send(torch.cat([p.pixels for p in prompts]), device), grids, prompts[0].spec),
            grids=grids,
            target=send(torch.stack([p.target for p in prompts]), device),
            vision=VisionLayout.of(grids, config.vision_config, device) if len(grids) else None,
            pairs=Pairs(packed, packed, causal=True),
            prompts=tuple(prompts),
        )


@dataclass(frozen=True)
class Replies:
    """The replies of some of a microbatch's groups, packed: T tokens to be scored, of which T_in are fed to
    the model (all but each last)."""

    layout: SharedPrefixLayout  # of the fed tokens
    ids: Tensor  # int64 [T], every reply token
    row: Tensor  # int64 [T], the rollout row of each
    place: Tensor  # int64 [T], its place in that row
    fed: Tensor  # int64 [T_in], the place in `ids` of each token that is fed
    position: Tensor  # int64 [T_in], rotary positions of the fed tokens
    # int64 [T], where each token's predicting state stands in cat(prompts' last states [B], reply states
    # [T_in])
    predictor: Tensor

    @staticmethod
    def of(
        batch: PromptBatch, ids: Tensor, lengths: Sequence[Sequence[int]], groups: Sequence[int]
    ) -> Replies:
        """ids: int64 [R, L], the sampled tokens, the rows of a group one after the other; lengths: of each
        prompt's replies, on the host; groups: the prompts whose replies are wanted, ascending."""
        B, device, chosen = len(batch.lengths), ids.device, set(groups)
        group_R = np.repeat(np.arange(B), [len(group) for group in lengths])
        wanted = np.flatnonzero(np.isin(group_R, list(groups)))
        length = np.array([n for b in groups for n in lengths[b]], dtype=np.int64)
        row = np.repeat(wanted, length)
        place = np.arange(len(row)) - np.repeat(length.cumsum() - length, length)
        is_fed = place < np.repeat(length, length) - 1
        fed = np.flatnonzero(is_fed)
        state = is_fed.cumsum() - is_fed + B  # of the token itself, where it is fed
        predictor = np.where(place == 0, group_R[row], state - 1)
        fed_lengths = [[n - 1 for n in group] if b in chosen else [] for b, group in enumerate(lengths)]
        row_T, place_T, fed_group, fed_place, fed_T, predictor_T = (
            send(torch.from_numpy(x), device)
            for x in (row, place, group_R[row[fed]], place[fed], fed, predictor)
        )
        return Replies(
            layout=SharedPrefixLayout.of(batch.pairs.queries, fed_lengths),
            ids=ids[row_T, place_T],
            row=row_T,
            place=place_T,
            fed=fed_T,
            position=batch.position[0, batch.last[fed_group]] + 1 + fed_place,
            predictor=predictor_T,
        )
