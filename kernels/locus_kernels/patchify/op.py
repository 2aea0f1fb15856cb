"""The public patchify: one registered operator for many images, so that it survives `torch.compile`; the
reference on CPU, the kernels on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from locus_kernels.dispatch import implementation, on_kernels
from locus_kernels.patchify import reference
from locus_kernels.patchify.reference import Box, Layout, Size


# --------------------------------------------------------------------------------------------------- operator
def _tuples(flat: list[int], width: int) -> list[Any]:
    return [tuple(flat[n : n + width]) for n in range(0, len(flat), width)]


@torch.library.custom_op("locus_kernels::patchify_images", mutates_args=())
def _operator(
    images: list[Tensor],
    sizes: list[int],
    boxes: list[int],
    patch: int,
    frames: int,
    merge: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    layout = Layout(patch, frames, merge, mean, std)
    run = implementation(reference, images[0]).patchify_images
    return run(images, _tuples(sizes, 2), _tuples(boxes, 4), layout, dtype)


@_operator.register_fake
def _shape(
    images: list[Tensor], sizes: list[int], boxes: list[int], patch: int, frames: int, *rest: Any
) -> Tensor:
    count = sum(reference.count_patches(_tuples(sizes, 2), patch))
    return images[0].new_empty(count, 3 * frames * patch**2, dtype=rest[-1])


# ----------------------------------------------------------------------------------------------------- public
def _check_layout(layout: Layout) -> None:
    patch, frames, merge, mean, std = layout
    if min(patch, frames, merge) < 1:
        raise ValueError(f"expected patch, frames and merge >= 1, got {patch}, {frames} and {merge}")
    if len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
        raise ValueError(f"expected mean and std of three channels, std above 0, got {mean} and {std}")


def _check_image(image: Tensor) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        expected = "a uint8 image of shape [height, width, 3]"
        raise ValueError(f"patchify expects {expected}, got {image.dtype} {list(image.shape)}")


def _check_size(height: int, width: int, block: int) -> None:
    if height < 1 or width < 1 or height % block or width % block:
        raise ValueError(f"patchify expects sides that are multiples of {block}, got {height} x {width}")


def _check_images(images: Sequence[Tensor], sizes: Sequence[Size], boxes: Sequence[Box], block: int) -> None:
    for name, width, rows in (("size", 2, sizes), ("box", 4, boxes)):
        for row in rows:
            if len(row) != width or not all(hasattr(number, "__index__") for number in row):
                raise ValueError(f"expected each {name} to be {width} whole numbers, got {row}")
    for image, (height, width), (x1, y1, x2, y2) in zip(images, sizes, boxes, strict=True):
        _check_image(image)
        _check_size(height, width, block)
        if image.device != images[0].device:
            raise ValueError(f"expected images of one device, got {images[0].device} and {image.device}")
        if not (0 <= x1 < x2 <= image.shape[1] and 0 <= y1 < y2 <= image.shape[0]):
            expected = f"a box inside its image of {image.shape[1]} x {image.shape[0]} pixels"
            raise ValueError(f"expected {expected}, got {(x1, y1, x2, y2)}")


def patchify(
    image: Tensor, *, patch: int, frames: int, merge: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Patches of one image, as it is.

    image: uint8 [height, width, 3], both sides multiples of `patch * merge`. mean, std: of the three
    channels, on the 0..1 scale.
    Returns float32 [height * width / patch**2, 3 * frames * patch**2]. ValueError for another dtype, shape or
    size.
    """
    _check_image(image)
    height, width = image.shape[:2]
    _check_size(height, width, patch * merge)
    if on_kernels(image):
        constants: dict[str, Any] = {"patch": patch, "frames": frames, "merge": merge}
        return patchify_images([image], [(height, width)], **constants, mean=mean, std=std)[0]
    return reference.cut(image, Layout(patch, frames, merge, mean, std))


def patchify_images(
    images: Sequence[Tensor],
    sizes: Sequence[Size],
    *,
    boxes: Sequence[Box | None] | None = None,
    patch: int,
    frames: int,
    merge: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Images of any sizes, perhaps cropped, resized as Pillow's BICUBIC does, normalised, as patches of a
    Qwen-VL vision tower, image after image.

    - images: uint8 [height, width, 3] each, any strides, one device. The same tensor may stand several times:
      an image and a crop of it, say.
    - sizes: the (height, width) in pixels that each becomes, multiples of `patch * merge`.
    - boxes: (x1, y1, x2, y2) in whole pixels, the part of each image to take, or None for all of it.
    - mean, std: of the three channels, on the 0..1 scale: a value is (byte / 255 - mean) / std.
    Returns (patches, `dtype` [N, 3 * frames * patch**2]; grid_thw, int64 [images, 3] on the CPU: frames, rows
    and columns of patches of each image). The resized bytes are those of Pillow 13, exactly; the patches are
    those of `Qwen2VLImageProcessorPil` for the same sizes, but for rounding.
    On CUDA: two launches for all images, and two small tables sent without waiting for the device. There is
    no gradient.
    Raises ValueError for another dtype, shape or device, a size that is no multiple, or a box that is empty
    or not inside its image.
    """
    whole = [(0, 0, image.shape[1], image.shape[0]) if image.ndim == 3 else (0, 0, 0, 0) for image in images]
    if not len(images) == len(sizes) == len(whole if boxes is None else boxes) or len(images) == 0:
        count = f"{len(images)} images, {len(sizes)} sizes and {len(whole if boxes is None else boxes)} boxes"
        raise ValueError(f"expected at least one image, and as many sizes and boxes as images, got {count}")
    taken = whole
    if boxes is not None:
        taken = [all_of_it if box is None else box for box, all_of_it in zip(boxes, whole, strict=True)]
    layout = Layout(patch, frames, merge, list(mean), list(std))
    _check_layout(layout)
    _check_images(images, sizes, taken, patch * merge)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    flat_sizes, flat_boxes = [int(n) for size in sizes for n in size], [int(n) for box in taken for n in box]
    patches = _operator(list(images), flat_sizes, flat_boxes, *layout, dtype)
    grid = [[1, height // patch, width // patch] for height, width in sizes]
    return patches, torch.tensor(grid, device="cpu")
