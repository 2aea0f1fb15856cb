"""Plain PyTorch patchify: an RGB image to the flat, normalised patches of a Qwen-VL vision tower.

Patch order (Qwen2-VL and later): grid cells are visited merge block by merge block, row by row inside a block, so that `merge ** 2` consecutive
patches become one language token. A patch is flattened as channel, frame, row, column; a still image is repeated for each frame.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(image: Tensor, *, patch: int, frames: int, merge: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Patches of one image.

    image: uint8 [height, width, 3], both sides multiples of `patch * merge`. mean, std: of the three channels, on the 0..1 scale.
    Returns float32 [height * width / patch**2, 3 * frames * patch**2]. ValueError for another dtype, shape or size.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"patchify expects a uint8 image of shape [height, width, 3], got {image.dtype} {list(image.shape)}")
    height, width, block = image.shape[0], image.shape[1], patch * merge
    if height % block or width % block:
        raise ValueError(f"patchify expects sides that are multiples of {block}, got {height} x {width}")
    scale = torch.tensor([1 / (255 * s) for s in std], device=image.device)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=image.device)
    cells = (image.float() * scale - shift).view(height // block, merge, patch, width // block, merge, patch, 3)
    cells = cells.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, 1, patch, patch)
    return cells.expand(-1, -1, frames, -1, -1).reshape(cells.shape[0], -1)
