"""Patchify against Pillow and against transformers' Qwen2-VL processor, and its errors. The kernels' cases
are in interpret.py."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from locus_kernels.patchify import op, patchify, patchify_images, reference
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from tests.kernels.interpreter import WAYS, run_cases

CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
QWEN25 = {"patch": 14, "frames": 2, "merge": 2, **CLIP}
COLUMNS_EVER_FIRST = int(PIL.__version__.split(".")[0]) >= 13


@pytest.mark.parametrize("interpret", WAYS)
def test_kernels(interpret: bool, subtests: pytest.Subtests) -> None:
    run_cases("patchify/interpret.py", interpret, subtests=subtests)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 120), st.integers(1, 120))
def test_resizes_to_the_bytes_of_pillow(height: int, width: int, out_height: int, out_width: int) -> None:
    image = picture(height, width, height * 1000 + width)
    if not COLUMNS_EVER_FIRST and reference.columns_first((height, width), (out_height, out_width)):
        return
    pillow = np.array(
        Image.fromarray(image.numpy()).resize((out_width, out_height), Image.Resampling.BICUBIC)
    )
    assert np.array_equal(reference.resize(image, (out_height, out_width)).numpy(), pillow)


@pytest.mark.parametrize(
    ("patch", "mean", "std"), [(14, CLIP["mean"], CLIP["std"]), (16, (0.5,) * 3, (0.5,) * 3)]
)
def test_is_the_processor_of_the_model_family(
    patch: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Qwen2.5-VL (14 pixels) and Qwen3-VL (16 pixels) share this processor. The bound is 1/255 before
    normalisation; found is rounding."""
    pictures = [picture(97, 131), picture(300, 222, 1), picture(64, 64, 2), picture(20, 333, 3)]
    pictures[1][40:200] = 255
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch, image_mean=list(mean), image_std=list(std), min_pixels=56 * 56, max_pixels=128 * 128
    )
    expected = processor([Image.fromarray(p.numpy()) for p in pictures], return_tensors="pt")
    sizes = [
        smart_resize(*p.shape[:2], factor=2 * patch, min_pixels=56 * 56, max_pixels=128 * 128)
        for p in pictures
    ]
    patches, grid = patchify_images(pictures, sizes, patch=patch, frames=2, merge=2, mean=mean, std=std)
    assert torch.equal(grid, torch.as_tensor(expected["image_grid_thw"]))
    difference = (patches - torch.as_tensor(expected["pixel_values"])).abs().max()
    assert difference <= 1 / 255 / max(std)
    assert difference < 1e-5


def test_a_crop_is_what_cropping_first_gives() -> None:
    image = picture(80, 90)
    both, grid = patchify_images(
        [image, image], [(56, 56), (28, 84)], boxes=[None, (11, 7, 60, 33)], **QWEN25
    )
    assert grid.tolist() == [[1, 4, 4], [1, 2, 6]]
    assert torch.equal(both[:16], patchify_images([image], [(56, 56)], **QWEN25)[0])
    pillow = Image.fromarray(image.numpy()).crop((11, 7, 60, 33)).resize((84, 28), Image.Resampling.BICUBIC)
    assert torch.equal(both[16:], patchify(torch.from_numpy(np.array(pillow)), **QWEN25))


def test_an_image_at_its_size_is_only_cut() -> None:
    image = picture(56, 84)
    assert torch.equal(patchify_images([image], [(56, 84)], **QWEN25)[0], patchify(image, **QWEN25))
    truth = (image.double() / 255 - torch.tensor(CLIP["mean"], dtype=torch.float64)) / torch.tensor(
        CLIP["std"], dtype=torch.float64
    )
    # block row, block column, row, column, channel, frame, y, x
    patches = patchify(image, **QWEN25).double().view(2, 3, 2, 2, 3, 2, 14, 14)
    back = patches[:, :, :, :, :, 1].permute(0, 2, 5, 1, 3, 6, 4).reshape(56, 84, 3)
    torch.testing.assert_close(back, truth, atol=1e-6, rtol=0)


def test_operator_is_registered_soundly_and_survives_compilation_whole() -> None:
    image = picture(40, 30)
    constants = (14, 2, 2, list(CLIP["mean"]), list(CLIP["std"]), torch.bfloat16)
    torch.library.opcheck(
        op._operator, ([image, image], [28, 28, 28, 56], [0, 0, 30, 40, 1, 2, 3, 4], *constants)
    )

    def both(image: Tensor) -> tuple[Tensor, Tensor]:
        return patchify_images([image, image], [(28, 28), (28, 56)], boxes=[None, (1, 2, 3, 4)], **QWEN25)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(image), both(image), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": [torch.zeros(28, 28, 3)]},
            r"uint8 image of shape \[height, width, 3\], got torch.float32 \[28, 28, 3\]",
        ),
        ({"images": [torch.zeros(28, 28, dtype=torch.uint8)]}, r"got torch.uint8 \[28, 28\]"),
        ({"images": [torch.zeros(28, 0, 3, dtype=torch.uint8)]}, r"got torch.uint8 \[28, 0, 3\]"),
        ({"images": []}, "at least one image, .*, got 0 images, 1 sizes and 0 boxes"),
        ({"sizes": [(28, 30)]}, "multiples of 28, got 28 x 30"),
        ({"sizes": [(0, 28)]}, "multiples of 28, got 0 x 28"),
        ({"sizes": []}, "as many sizes and boxes as images"),
        ({"boxes": [None, None]}, "got 1 images, 1 sizes and 2 boxes"),
        ({"boxes": [(0, 0, 31, 40)]}, r"a box inside its image of 30 x 40 pixels, got \(0, 0, 31, 40\)"),
        ({"boxes": [(5, 5, 5, 9)]}, r"got \(5, 5, 5, 9\)"),
        ({"boxes": [(-1, 0, 5, 9)]}, r"got \(-1, 0, 5, 9\)"),
        ({"boxes": [(0.5, 0, 5, 9)]}, r"each box to be 4 whole numbers, got \(0.5, 0, 5, 9\)"),
        ({"boxes": [(0, 5, 9)]}, r"each box to be 4 whole numbers, got \(0, 5, 9\)"),
        ({"sizes": [(28, 28, 1)]}, r"each size to be 2 whole numbers, got \(28, 28, 1\)"),
        ({"patch": 0}, "patch, frames and merge >= 1"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"mean": (0.5,)}, "three channels"),
        ({"dtype": torch.float64}, "dtype: expected float32"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(change: dict, message: str) -> None:
    arguments = {"images": [picture(40, 30)], "sizes": [(28, 28)], **QWEN25} | change
    with pytest.raises(ValueError, match=message):
        patchify_images(arguments.pop("images"), arguments.pop("sizes"), **arguments)


@pytest.mark.parametrize("shape", [(30, 28, 3), (28, 28, 4), (28, 28)])
def test_errors_of_one_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="patchify expects"):
        patchify(torch.zeros(shape, dtype=torch.uint8), **QWEN25)
