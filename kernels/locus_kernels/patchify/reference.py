"""Plain PyTorch patchify: RGB images to the flat, normalised patches of a Qwen-VL vision tower, resized as
Pillow resizes them.

Patch order (Qwen2-VL and later): grid cells are visited merge block by merge block, row by row inside a
block, so that `merge ** 2` consecutive patches become one language token. A patch is flattened as channel,
frame, row, column; a still image is repeated for each frame.

Resizing is Pillow's BICUBIC: Keys' cubic (a = -1/2), stretched over the source pixels that an output pixel
covers, in two passes, along the rows and along the columns, in fixed point with 22 bits behind the point,
each rounded to a byte. All integers: the bytes are those of Pillow 13. (Earlier versions never take the
columns first, which now and then changes a byte of an image that loses much more height than width.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Box = tuple[int, int, int, int]
Size = tuple[int, int]
FRACTION_BITS = 22
HALF = 1 << (FRACTION_BITS - 1)


class Layout(NamedTuple):
    """How a vision tower wants its patches."""

    patch: int  # side in pixels
    frames: int  # how often a still image is repeated
    merge: int  # patches along one side of a block, which becomes one language token
    mean: Sequence[float]  # of the three channels, on the 0..1 scale
    std: Sequence[float]


class Taps(NamedTuple):
    """Where one axis of a resize reads: output pixel o is the sum over k of weight[k, o] * source[start[o] +
    k], in units of 2**-22."""

    start: Tensor  # int32 [out]
    weight: Tensor  # int32 [K, out]; 0 past the last pixel that counts


@lru_cache(maxsize=1024)
def taps(source: int, out: int) -> Taps:
    """The taps (CPU) of resizing `source` pixels to `out`; Pillow's precompute_coeffs and
    normalize_coeffs_8bpc in float64."""
    scale = source / out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centre = (torch.arange(out, dtype=torch.float64, device="cpu") + 0.5) * scale
    start = (centre - support + 0.5).long().clamp(min=0)
    stop = (centre + support + 0.5).long().clamp(max=source)
    k = torch.arange(int((stop - start).max()), device="cpu")[:, None]
    x = ((k + start - centre + 0.5) / stretch).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * (k < stop - start)
    fixed = weight / weight.sum(0) * (1 << FRACTION_BITS)
    return Taps(start.int(), (fixed + torch.where(fixed < 0, -0.5, 0.5)).int())


def resize_rows(image: Tensor, width: int) -> Tensor:
    """Each row of uint8 [H, W, C] resized to `width`: uint8 [H, width, C]."""
    start, weight = (t.to(image.device) for t in taps(image.shape[1], width))
    total = torch.full((image.shape[0], width, image.shape[2]), HALF, dtype=torch.int32, device=image.device)
    for k, weight_O in enumerate(weight):
        total += image[:, (start + k).clamp(max=image.shape[1] - 1)] * weight_O[:, None]
    return (total >> FRACTION_BITS).clamp(0, 255).to(torch.uint8)


def columns_first(source: Size, out: Size) -> bool:
    """Whether the first pass goes along the columns; sizes are (height, width). The rule that Pillow 13 was
    seen to follow."""
    fewer_rows, fewer_columns = source[0] - out[0], source[1] - out[1]
    return fewer_rows > max(0, 2 * fewer_columns)


def resize(image: Tensor, size: Size) -> Tensor:
    """uint8 [H, W, C] to uint8 [size[0], size[1], C], the bytes that Pillow's `Image.resize((size[1],
    size[0]), BICUBIC)` gives."""
    if columns_first((image.shape[0], image.shape[1]), size):
        return resize_rows(resize_rows(image.transpose(0, 1), size[0]).transpose(0, 1), size[1])
    return resize_rows(resize_rows(image, size[1]).transpose(0, 1), size[0]).transpose(0, 1)


def normalization(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """(scale, shift) of the three channels such that a byte's value is byte * scale - shift."""
    return [1 / (255 * s) for s in std], [m / s for m, s in zip(mean, std, strict=True)]


def cut(image: Tensor, layout: Layout) -> Tensor:
    """float32 [N, 3 * frames * patch**2]: the patches of uint8 [H, W, 3], as it is."""
    patch, frames, merge, mean, std = layout
    height, width, block = image.shape[0], image.shape[1], patch * merge
    scale, shift = (torch.tensor(x, device=image.device) for x in normalization(mean, std))
    rows, columns = height // block, width // block
    cells = (image.float() * scale - shift).reshape(rows, merge, patch, columns, merge, patch, 3)
    cells = cells.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, 1, patch, patch)
    return cells.expand(-1, -1, frames, -1, -1).reshape(cells.shape[0], -1)


def patchify(
    image: Tensor, *, patch: int, frames: int, merge: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """What `op.patchify` documents."""
    return cut(image, Layout(patch, frames, merge, mean, std))


def patchify_images(
    images: Sequence[Tensor],
    sizes: Sequence[Size],
    boxes: Sequence[Box],
    layout: Layout,
    dtype: torch.dtype,
) -> Tensor:
    """The patches that `op.patchify_images` documents; a box for every image."""
    parts = [
        cut(resize(image[y1:y2, x1:x2], size), layout)
        for image, size, (x1, y1, x2, y2) in zip(images, sizes, boxes, strict=True)
    ]
    return torch.cat(parts).to(dtype)


def count_patches(sizes: Sequence[Size], patch: int) -> list[int]:
    """How many patches each image of a size (height, width) has."""
    return [math.prod(size) // patch**2 for size in sizes]
