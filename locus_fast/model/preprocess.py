"""Images to what a vision tower takes: resized bytes on the host, in a loader's thread, and normalised
patches wherever the bytes were sent."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from locus_kernels.patchify import patchify_images
from locus_kernels.patchify.reference import normalization
from PIL import Image
from torch import Tensor

from locus_fast.data.resize import grid_size
from locus_fast.errors import UserError
from locus_fast.model.processor import processor_config

# What an image processor's config may state of the rest, and how images are prepared here.
PROCESSING = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": int(Image.Resampling.BICUBIC),
}
EXAMPLES = ((4000, 3000), (300, 200))  # width and height of a photograph and of a small picture
BAND = 8  # rows of language tokens that the CPU makes patches of at a time: their floats stay in its cache


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
        """From a model's config and the config of its image processor, see `processor_config`. Raises
        UserError without three means and three deviations, and for a processor that makes other patches than
        these."""
        vision, (path, stated) = config.vision_config, processor_config(folder)
        try:
            mean, std = (tuple(float(v) for v in stated[key]) for key in ("image_mean", "image_std"))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} must be readable JSON with image_mean and image_std: {error}.") from None
        if (
            not len(mean) == len(std) == 3
            or not all(map(math.isfinite, mean))
            or not all(0 < s < math.inf for s in std)
        ):
            raise UserError(
                f"{path} must give image_mean and image_std as three numbers each, the second above 0."
            )
        sizes = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
        expected = {
            **PROCESSING,
            **dict(zip(("patch_size", "temporal_patch_size", "merge_size"), sizes, strict=True)),
        }
        for key, value in expected.items():
            if (got := stated.get(key, value)) is not None and not _same(got, value):
                what = f"{key} is {json.dumps(got)}, and must be {json.dumps(value)}"
                raise UserError(f"{path}: {what}, as images are prepared for this model.")
        return PatchSpec(*sizes, mean, std)  # type: ignore[arg-type]


def _same(got: Any, value: Any) -> bool:
    if isinstance(got, bool) or isinstance(value, bool) or not isinstance(got, int | float):
        return got is value
    return math.isclose(got, value, rel_tol=1e-6)


def describe_limits(here: tuple[int, int], own: tuple[int, int], factor: int, exported: bool) -> str:
    """One line where images are trained with another fewest and most of pixels than the model's own image
    processor has; else nothing. factor: pixels of a language token's side; exported: whether final/ gets the
    limits of training."""
    if here == own:
        return ""
    words = [f"{least:,} to {most:,} pixels" for least, most in (here, own)]
    if exported:
        return f"the image processor in final/ gets {words[0]}, as in training, for its own {words[1]}"
    sizes = []
    for width, height in EXAMPLES:
        made = [
            grid_size(height, width, factor=factor, min_pixels=least, max_pixels=most)
            for least, most in (here, own)
        ]
        if made[0] != made[1]:
            (rows, columns), (own_rows, own_columns) = made
            sizes.append(f"{width}x{height} is {columns}x{rows} here and {own_columns}x{own_rows} there")
    shown = f": {', '.join(sizes)}" if sizes else ""
    what = f"images have {words[0]} here, and {words[1]} by the model's own processor{shown}"
    return f"{what} (--export-limits gives it those of training)"


def patches_of(pixels: Tensor, grids: Tensor, spec: PatchSpec) -> Tensor:
    """Normalised patches of resized images, image after image, on the device of `pixels`.

    pixels: uint8, the bytes of every image [height, width, 3] end to end; grids: int64 [images, 3] on the
    host, frames, rows and columns of patches. Returns float32 [patches, 3 * frames * patch**2], the same
    numbers as `locus_kernels.patchify`, whose kernels make them on CUDA.
    """
    sizes = [(rows * spec.patch, columns * spec.patch) for _, rows, columns in grids.tolist()]
    images = [
        part.view(*size, 3)
        for part, size in zip(pixels.split([h * w * 3 for h, w in sizes]), sizes, strict=True)
    ]
    layout = {"patch": spec.patch, "frames": spec.frames, "merge": spec.merge}
    if pixels.device.type != "cpu" and images:
        moments = {"mean": spec.mean, "std": spec.std}
        return patchify_images(images, sizes, **layout, **moments)[0]  # type: ignore[arg-type]
    count, values = pixels.numel() // (3 * spec.patch**2), 3 * spec.frames * spec.patch**2
    # in huge pages, which NumPy asks for and PyTorch does not
    patches = torch.from_numpy(np.empty((count, values), np.float32))
    for image, part in zip(images, patches.split([h * w // spec.patch**2 for h, w in sizes]), strict=True):
        lines = BAND * spec.factor
        for band, there in zip(
            image.split(lines), part.split(lines * image.shape[1] // spec.patch**2), strict=True
        ):
            _write_patches(band, there, spec)
    return patches


def _write_patches(image: Tensor, patches: Tensor, spec: PatchSpec) -> None:
    """On the CPU: bytes to planes of floats, each normalised in place, then each value to its place in its
    patch, once a frame."""
    planes = image.permute(2, 0, 1).contiguous().float()
    for plane, scale, shift in zip(planes, *normalization(spec.mean, spec.std), strict=True):
        plane.mul_(scale).sub_(shift)
    rows, columns, cell = (
        image.shape[0] // spec.factor,
        image.shape[1] // spec.factor,
        (spec.merge, spec.patch),
    )
    # block row and column, row and column in it, channel, y, x
    cells = planes.view(3, rows, *cell, columns, *cell).permute(1, 4, 2, 5, 0, 3, 6)
    patches.view(*cells.shape[:5], spec.frames, spec.patch, spec.patch).copy_(cells.unsqueeze(5))
