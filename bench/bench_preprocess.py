"""Image and cue to patches: the families' own image processor (their PIL path), and ours, from the loader's
resize to the batch's patches.

Eight images and cues a pass, in turns, a pass untimed before each timed one, so that neither side pays for
memory that the other gave back. The figures are ratios of medians: one thread each, in processor time; the
loader's part of it alone, which is all that the host does where a device makes the patches; and by the wall
clock the loader's threads against the processor as it is called. Each side is given what it likes best, the
processor PIL images and we arrays, and both have the recipe's limits for images and for cues. Nothing is
timed unless grids and patches are the processor's. Pillow's resize is part of both sides, and most of ours.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from locus_fast.config import Config, parse
from locus_fast.model.families import FAMILIES
from locus_fast.model.preprocess import PatchSpec, patches_of

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SPECS = {"qwen2_5_vl": PatchSpec(14, 2, 2, *CLIP), "qwen3_vl": PatchSpec(16, 2, 2, (0.5,) * 3, (0.5,) * 3)}
TASKS = {  # (width, height) of image and cue
    "640x480 and its cue": [((640, 480), (96, 72))],
    "mixed sizes": [
        ((500, 375), (31, 44)),
        ((427, 640), (210, 160)),
        ((1280, 853), (330, 250)),
        ((333, 500), (18, 60)),
    ],
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
        constants: dict[str, Any] = {
            "patch_size": self.spec.patch,
            "image_mean": list(self.spec.mean),
            "image_std": list(self.spec.std),
        }
        self.processors = [
            Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high}, **constants)
            for low, high in self.limits
        ]

    def peer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(grids, patches) of image `index` and its cue."""
        made = [
            process(picture, return_tensors="pt")
            for process, picture in zip(self.processors, self.pictures[index], strict=True)
        ]
        return torch.cat([out["image_grid_thw"] for out in made]), torch.cat(
            [out["pixel_values"] for out in made]
        )

    def load(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(grids, bytes): what a loader's thread does, and with an accelerator all that the host does."""
        resized = [
            self.family.resize(array, factor=self.spec.factor, min_pixels=low, max_pixels=high)
            for array, (low, high) in zip(self.arrays[index], self.limits, strict=True)
        ]
        grids = torch.tensor(
            [(1, image.shape[0] // self.spec.patch, image.shape[1] // self.spec.patch) for image in resized]
        )
        return grids, torch.from_numpy(np.concatenate([image.ravel() for image in resized]))

    def ours(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(grids, patches)."""
        grids, pixels = self.load(index)
        return grids, patches_of(pixels, grids, self.spec)


def seconds_of(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Of the second of two goes: the first asks the system for the memory that the side before gave back."""
    work()
    began = clock()
    work()
    return clock() - began


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("sizes", TASKS)
@pytest.mark.parametrize("family", SPECS)
def test_preprocess(benchmark, family: str, sizes: str) -> None:
    course = Course(family, TASKS[sizes])
    order = list(range(len(course.arrays))) * (8 // len(course.arrays))
    for index in set(order):
        (grids, patches), (their_grids, their_patches) = course.ours(index), course.peer(index)
        assert torch.equal(grids, their_grids)
        torch.testing.assert_close(patches, their_patches, rtol=0, atol=1e-5)
    seconds: dict[str, list[float]] = defaultdict(list)

    def each(way: Callable[[int], Any]) -> None:
        for index in order:
            way(index)  # and its patches are dropped

    def others() -> tuple[tuple[Callable[[int], Any]], dict[str, Any]]:
        for name, work, clock in (
            ("peer", lambda: each(course.peer), time.process_time),
            ("bytes", lambda: each(course.load), time.process_time),
            ("peer by the wall", lambda: each(course.peer), time.perf_counter),
            (
                "threads by the wall",
                lambda: list(pool.map(lambda index: course.ours(index) and None, order)),
                time.perf_counter,
            ),
        ):
            seconds[name].append(seconds_of(work, clock))
        each(course.ours)
        return (course.ours,), {}

    benchmark.group = f"image and cue to patches, {family}, {sizes}"
    with ThreadPoolExecutor(Config().workers) as pool:
        benchmark.pedantic(each, setup=others, rounds=ROUNDS, warmup_rounds=1)
    median = {name: statistics.median(values) for name, values in seconds.items()} | {
        "ours": benchmark.stats.stats.median
    }
    over = {
        "one thread": median["peer"] / median["ours"],
        "one thread, patches made by a device": median["peer"] / median["bytes"],
        "the loader's threads": median["peer by the wall"] / median["threads by the wall"],
    }
    benchmark.extra_info |= {"ms an image": 500 * median["ours"] / len(order)} | {
        f"images/s over the processor's, {way}": ratio for way, ratio in over.items()
    }
    print(
        f"\n{family}, {sizes}, images/s over the processor's: "
        + "; ".join(f"{way} {ratio:.2f}" for way, ratio in over.items())
    )
