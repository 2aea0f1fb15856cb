"""Image to patches: PIL and the model family's processor, eager PyTorch (its own antialiased resize),
torch.compile, and ours.

The processor and PIL work on the host and are given host images; the others start from images on the device.
"""

from __future__ import annotations

import pytest
import torch
from locus_kernels.patchify import patchify_images, reference
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bench.roofline import DEVICE, timed

SOURCE, OUT, COUNT = ((1080, 1440), (784, 1036), 8) if DEVICE == "cuda" else ((270, 360), (196, 252), 2)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONSTANTS = {"patch": 14, "frames": 2, "merge": 2, "mean": MEAN, "std": STD}
PROCESSOR = Qwen2VLImageProcessorPil(do_resize=False, image_mean=list(MEAN), image_std=list(STD))


def picture(seed: int) -> torch.Tensor:
    """A smooth random image: on noise, clamping between the passes (as Pillow does) would set float
    arithmetic far apart."""
    coarse = torch.rand(1, 3, SOURCE[0] // 30, SOURCE[1] // 30, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, SOURCE, mode="bilinear", align_corners=False)
    return (smooth[0].permute(1, 2, 0) * 200 + 25).to(torch.uint8).contiguous()


def processor(images, pictures):
    resized = [picture.resize((OUT[1], OUT[0]), Image.Resampling.BICUBIC) for picture in pictures]
    return torch.as_tensor(PROCESSOR(resized, return_tensors="pt")["pixel_values"])


def eager(images, pictures):
    """Float arithmetic throughout: its bytes differ from Pillow's by one here and there."""
    parts = []
    for image in images:
        planar = image.permute(2, 0, 1)[None].float()
        resized = torch.nn.functional.interpolate(
            planar, OUT, mode="bicubic", antialias=True, align_corners=False
        )
        parts.append(reference.patchify(resized[0].round().clamp(0, 255).permute(1, 2, 0), **CONSTANTS))
    return torch.cat(parts)


def ours(images, pictures):
    return patchify_images(images, [OUT] * len(images), **CONSTANTS)[0]


WAYS = {
    "PIL processor": processor,
    "eager": eager,
    "torch.compile": torch.compile(eager, dynamic=False),
    "ours": ours,
}


@pytest.mark.parametrize("way", WAYS)
def test_patchify(benchmark, way: str) -> None:
    inputs = []
    for n in range(3):
        images = [picture(n * COUNT + k) for k in range(COUNT)]
        inputs.append(
            ([image.to(DEVICE) for image in images], [Image.fromarray(image.numpy()) for image in images])
        )
    for task in inputs:
        difference = (WAYS[way](*task).cpu() - processor(*task)).abs()
        assert difference.max() <= (2.5 if way in ("eager", "torch.compile") else 0.01) / 255 / min(STD), (
            float(difference.max())
        )
    benchmark.group = f"patchify, {COUNT} images of {SOURCE[0]} x {SOURCE[1]} to {OUT[0]} x {OUT[1]}"
    moved = COUNT * (SOURCE[0] * SOURCE[1] * 3 + OUT[0] * OUT[1] * 3 * 2 * 4)
    timed(benchmark, WAYS[way], inputs, moved=moved, rounds=30 if DEVICE == "cuda" else 5)
