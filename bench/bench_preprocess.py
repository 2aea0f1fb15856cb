"""Image and cue to patches: the families' own image processor (their PIL path), and ours, from the loader's resize to the batch's patches.

One thread each, in processor time and in turns, so that whatever else the machine does falls on both; the figure is the ratio of the medians. Each
side is given what it likes best, the processor PIL images and we arrays, and both have the recipe's limits for images and for cues. Nothing is timed
unless grids and patches are the processor's. Pillow's resize is part of both sides, and most of ours.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from locus_fast.config import parse
from locus_fast.families import FAMILIES
from locus_fast.preprocess import PatchSpec, patches_of

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SPECS = {"qwen2_5_vl": PatchSpec(14, 2, 2, *CLIP), "qwen3_vl": PatchSpec(16, 2, 2, (0.5,) * 3, (0.5,) * 3)}
TASKS = {  # (width, height) of image and cue
    "640x480 and its cue": [((640, 480), (96, 72))],
    "mixed sizes": [((500, 375), (31, 44)), ((427, 640), (210, 160)), ((1280, 853), (330, 250)), ((333, 500), (18, 60))],
}
ROUNDS = 9


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photograph(width: int, height: int, seed: int) -> np.ndarray:
    """Random shapes and colours, smooth with some noise: uint8 [height, width, 3]."""
    rng = np.random.default_rng([seed, width, height])
    coarse = Image.fromarray(rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR), dtype=np.int16)
    return (smooth + rng.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8)


class Course:
    """One family's processor and our functions over the same images and cues."""

    def __init__(self, family: str, sizes: list):
        recipe = parse(["--preset", "qwen2.5-vl-7b", "--data", "boxes.json"])
        self.family, self.spec = FAMILIES[family], SPECS[family]
        self.limits = (recipe.image_pixels, recipe.cue_pixels)
        self.arrays = [tuple(photograph(*size, seed) for size in pair) for seed, pair in enumerate(sizes)]
        self.pictures = [tuple(Image.fromarray(array) for array in pair) for pair in self.arrays]
        constants: dict[str, Any] = {"patch_size": self.spec.patch, "image_mean": list(self.spec.mean), "image_std": list(self.spec.std)}
        self.processors = [Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high}, **constants) for low, high in self.limits]

    def peer(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(grids, patches) of each image and cue."""
        made = [process(picture, return_tensors="pt") for pair in self.pictures for process, picture in zip(self.processors, pair, strict=True)]
        return [(out["image_grid_thw"], out["pixel_values"]) for out in made]

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(grids, bytes) of all of them: what a loader's thread does, and with an accelerator all that the host does."""
        resized = [
            self.family.resize(array, factor=self.spec.factor, min_pixels=low, max_pixels=high)
            for pair in self.arrays
            for array, (low, high) in zip(pair, self.limits, strict=True)
        ]
        grids = torch.tensor([(1, image.shape[0] // self.spec.patch, image.shape[1] // self.spec.patch) for image in resized])
        return grids, torch.from_numpy(np.concatenate([image.ravel() for image in resized]))

    def ours(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(grids, patches) of all of them."""
        grids, pixels = self.load()
        return grids, patches_of(pixels, grids, self.spec)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("sizes", TASKS)
@pytest.mark.parametrize("family", SPECS)
def test_preprocess(benchmark, family: str, sizes: str) -> None:
    course = Course(family, TASKS[sizes])
    (grids, patches), expected = course.ours(), course.peer()
    assert torch.equal(grids, torch.cat([grid for grid, _ in expected]))
    torch.testing.assert_close(patches, torch.cat([patch for _, patch in expected]), rtol=0, atol=1e-5)
    seconds: dict[str, list[float]] = defaultdict(list)

    def others() -> None:
        for way in (course.peer, course.load):
            began = time.process_time()
            way()
            seconds[way.__name__].append(time.process_time() - began)

    benchmark.group = f"image and cue to patches, {family}, {sizes}"
    benchmark.pedantic(course.ours, setup=others, rounds=ROUNDS, warmup_rounds=1)
    images, median = len(grids), benchmark.stats.stats.median
    peer = statistics.median(seconds["peer"])
    ratio, loaded = peer / median, peer / statistics.median(seconds["load"])
    over = {"images/s over the processor's": round(ratio, 2), "the loader's alone": round(loaded, 2)}
    benchmark.extra_info |= {"images": images, "ms an image": round(1e3 * median / images, 3), **over}
    print(f"\n{family}, {sizes}: {ratio:.2f} times the processor's images/s; where a device makes the patches, {loaded:.2f} times")
