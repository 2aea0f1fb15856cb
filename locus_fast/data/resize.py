"""The size that a vision tower's processor gives an image, and the resize to it."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def grid_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (height, width) an image is resized to: multiples of `factor`, the aspect ratio kept as far as that
    allows, and the area between min_pixels and max_pixels. This is the rule that Qwen2-VL published and its
    successors kept."""
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
