"""Images to what a vision tower takes: resize to the family's grid, patches, and how many language tokens they become."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from locus_fast.errors import UserError


@dataclass(frozen=True)
class PatchSpec:
    """The patch layout of a vision tower, and the normalisation its image processor states."""

    patch: int  # pixels of a patch's side
    frames: int  # a still image is repeated this often in time
    merge: int  # patches of a language token's side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def factor(self) -> int:
        """Pixels of a language token's side: image sides are multiples of it."""
        return self.patch * self.merge

    @staticmethod
    def of(config: Any, folder: Path) -> PatchSpec:
        """From a model's config and the `preprocessor_config.json` in its folder."""
        vision, path = config.vision_config, folder / "preprocessor_config.json"
        try:
            stated = json.loads(path.read_text())
            mean, std = (tuple(float(v) for v in stated[key]) for key in ("image_mean", "image_std"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} must be readable JSON with image_mean and image_std: {error}.") from None
        return PatchSpec(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, mean, std)  # type: ignore[arg-type]


def grid_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (height, width) an image is resized to: multiples of `factor`, the aspect ratio kept as far as that allows, and the area between
    min_pixels and max_pixels. This is the rule that Qwen2-VL published and its successors kept."""
    rows, columns = (round(side / factor) * factor for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def resize(image: np.ndarray, *, factor: int, min_pixels: int, max_pixels: int) -> np.ndarray:
    """`image` (uint8 [height, width, 3]) at its grid size, bicubic and antialiased as PIL does it."""
    rows, columns = grid_size(*image.shape[:2], factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
    if (rows, columns) == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC))
