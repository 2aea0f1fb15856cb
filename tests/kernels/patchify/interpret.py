"""Cases of the patchify kernels; test_patchify.py runs them under the interpreter and on the GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from locus_kernels.patchify import reference
from locus_kernels.patchify.reference import Layout
from locus_kernels.patchify.triton import TILE, Tile, patchify_images
from torch import Tensor

from tests.kernels.interpreter import device, poisoned_empty

DEVICE = device()
QWEN25 = Layout(patch=14, frames=2, merge=2, mean=(0.48, 0.45, 0.40), std=(0.26, 0.27, 0.28))
QWEN3 = Layout(patch=16, frames=2, merge=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
BIG = Tile(64, 512, 8192) if DEVICE == "cpu" else TILE  # the interpreter's time is in the programs


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_empty(monkeypatch)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    ).to(DEVICE)


def assert_same(
    images: list[Tensor],
    sizes: list[tuple[int, int]],
    boxes: list[tuple[int, int, int, int]] | None = None,
    *,
    layout: Layout = QWEN25,
    tile: Tile = BIG,
    dtype: torch.dtype = torch.float32,
) -> None:
    """The kernels give the reference's bits, twice."""
    taken = boxes or [(0, 0, image.shape[1], image.shape[0]) for image in images]
    got, again = (patchify_images(images, sizes, taken, layout, dtype, tile=tile) for _ in range(2))
    assert torch.equal(got, again)
    expected = reference.patchify_images(images, sizes, taken, layout, torch.float32)
    if dtype == torch.float32:
        assert torch.equal(got, expected)
    else:  # the interpreter truncates to bfloat16
        torch.testing.assert_close(got.float(), expected, rtol=2**-7, atol=1e-6)


def test_images_of_different_sizes_and_crops_of_them() -> None:
    images = [picture(97, 131), picture(30, 21, 1), picture(300, 40, 2), picture(1, 1, 3)]
    sizes = [(56, 84), (84, 28), (28, 56), (28, 28)]
    assert_same(images, sizes)
    assert_same(images, sizes, [(10, 20, 47, 90), (0, 0, 21, 30), (39, 0, 40, 300), (0, 0, 1, 1)])
    crops = [(0, 0, 131, 97), (130, 96, 131, 97), (5, 5, 33, 61), (0, 50, 131, 51)]
    assert_same([images[0]] * 4, sizes, crops)
    assert_same([images[0]], [(32, 64)], layout=QWEN3)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 140),
    width=st.integers(1, 140),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    layout=st.sampled_from([(4, 1, 1), (3, 2, 2), (2, 3, 3)]),  # patch, frames, merge
)
def test_any_size(height: int, width: int, rows: int, columns: int, layout: tuple[int, int, int]) -> None:
    block = layout[0] * layout[2]
    size = (rows * block, columns * block)
    assert_same([picture(height, width, height)], [size], layout=Layout(*layout, QWEN25.mean, QWEN25.std))


def test_the_tiles_of_the_device() -> None:
    """The same at the tile sizes that are compiled, on images that need several tiles of either kernel."""
    assert_same([picture(19, 61), picture(90, 11, 1)], [(28, 56), (28, 28)], tile=TILE)


def test_strides() -> None:
    image = picture(45, 33)
    planar = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    wide = torch.full((90, 99, 4), 255, dtype=torch.uint8, device=DEVICE)
    wide[::2, ::3, :3] = image
    for shown in (planar, wide[::2, ::3, :3], image.flip(0).flip(0)):
        assert_same([shown], [(28, 28)], [(3, 4, 31, 45)])
        got, plain = (
            patchify_images([each], [(28, 28)], [(0, 0, 33, 45)], QWEN25, torch.float32, tile=BIG)
            for each in (shown, image)
        )
        assert torch.equal(got, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_outputs(dtype: torch.dtype) -> None:
    assert_same([picture(50, 40)], [(28, 56)], dtype=dtype)
