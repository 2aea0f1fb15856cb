"""Patchify: launches, and the largest tensor. Nothing is computed."""

from __future__ import annotations

import pytest
import torch
from locus_kernels.patchify.reference import Layout

from tests.kernels.probes import Allocations


def test_launches(launches: list[str]) -> None:
    kernels = pytest.importorskip("locus_kernels.patchify.triton")
    images = [torch.zeros(270, 360, 3, dtype=torch.uint8), torch.zeros(97, 131, 3, dtype=torch.uint8)]
    sizes, boxes = [(196, 252), (56, 84), (28, 28)], [(0, 0, 360, 270), (0, 0, 131, 97), (10, 20, 70, 90)]
    layout = Layout(patch=14, frames=2, merge=2, mean=(0.5,) * 3, std=(0.5,) * 3)
    with Allocations() as seen:
        patches = kernels.patchify_images([*images, images[0]], sizes, boxes, layout, torch.float32)
    assert launches == ["first_kernel", "second_kernel"]
    assert seen.largest == patches.numel()  # the bytes between the passes and the plan are smaller
