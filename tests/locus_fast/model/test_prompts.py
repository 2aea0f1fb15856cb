"""Frames, the resize rule and patches against the image processor of transformers; prompts, how they are
sent, and how they are made ahead."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from locus_kernels.patchify import patchify_images, reference
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from locus_fast.data.example import Example
from locus_fast.data.resize import grid_size
from locus_fast.errors import UserError
from locus_fast.model import packing, preprocess
from locus_fast.model.families import Frame, frame_of
from locus_fast.model.packing import PromptBatch
from locus_fast.model.preprocess import PatchSpec, patches_of
from locus_fast.model.prompts import DIRECT, THINK, Prompter
from locus_fast.run.inputs import prefetch
from locus_fast.tiny.model import build_model
from locus_fast.tiny.tokenizer import SPECIAL, build_tokenizer
from tests.small_models import small_model, small_prompt

SPEC = PatchSpec(14, 2, 2, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def example(width: int, height: int, box=(10.0, 20.0, 50.0, 44.0)) -> Example:
    rng = np.random.default_rng([width, height])
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Example(image, image[20:44, 10:50], box, "small", f"random {width}x{height}")


@pytest.mark.parametrize("factor", [16, 28, 32])
def test_grid_size_is_the_published_rule(factor: int) -> None:
    rng = np.random.default_rng(0)
    for height, width in rng.integers(16, 3000, (300, 2)).tolist():
        if max(height, width) / min(height, width) < 200:
            expected = smart_resize(height, width, factor=factor, min_pixels=56 * 56, max_pixels=1280 * 784)
            assert (
                grid_size(height, width, factor=factor, min_pixels=56 * 56, max_pixels=1280 * 784) == expected
            )


@pytest.mark.parametrize(("width", "height"), [(97, 61), (500, 375), (41, 300)])
def test_pixels_and_grids_equal_the_image_processor(width: int, height: int) -> None:
    tokenizer = build_tokenizer()
    model = build_model({token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL})
    prompter = Prompter(
        tokenizer, model.config, SPEC, style="think", image_pixels=(3136, 100352), cue_pixels=(3136, 100352)
    )
    task = example(width, height)
    prompt = prompter(task)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 100352})
    expected = processor([task.image, task.cue], return_tensors="pt")
    assert torch.equal(prompt.grids, expected["image_grid_thw"])
    torch.testing.assert_close(prompt.patches, expected["pixel_values"], rtol=0, atol=1e-5)
    assert int((prompt.ids == prompter.placeholder).sum()) == int(prompt.grids.prod(1).sum()) // 4
    assert prompt.pixels.dtype == torch.uint8  # what waits in the loader is an eighth of the patches
    assert prompt.patches.nbytes == 8 * prompt.pixels.nbytes


@pytest.mark.parametrize(("patch", "frames", "merge"), [(14, 2, 2), (16, 2, 2), (8, 1, 3), (7, 3, 1)])
def test_patches_are_the_references_to_the_bit(patch: int, frames: int, merge: int) -> None:
    """On the CPU; and what CUDA is asked for, images at their own sizes, is the same."""
    spec, rng = (
        PatchSpec(patch, frames, merge, (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)),
        torch.Generator().manual_seed(patch),
    )
    # the last in several bands
    grids = torch.tensor([(1, 3 * merge, 5 * merge), (1, merge, merge), (1, 19 * merge, 2 * merge)])
    images = [
        torch.randint(0, 256, (h * patch, w * patch, 3), generator=rng, dtype=torch.uint8)
        for _, h, w in grids.tolist()
    ]
    layout = {"patch": patch, "frames": frames, "merge": merge, "mean": spec.mean, "std": spec.std}
    patches = patches_of(torch.cat([image.flatten() for image in images]), grids, spec)
    assert torch.equal(patches, torch.cat([reference.patchify(image, **layout) for image in images]))
    assert torch.equal(patches, patchify_images(images, [image.shape[:2] for image in images], **layout)[0])
    assert patches_of(torch.empty(0, dtype=torch.uint8), grids[:0], spec).shape == (0, 3 * frames * patch**2)


def test_images_are_sent_as_bytes_and_once(monkeypatch) -> None:
    model, sent = small_model("qwen2_5_vl"), []
    prompts = [
        small_prompt(model, grids, words=4, seed=seed)
        for seed, grids in enumerate([[(8, 12), (4, 4)], [], [(4, 8)]])
    ]
    monkeypatch.setattr(packing, "send", lambda tensor, device: sent.append(tensor) or tensor.to(device))
    batch = PromptBatch.of(prompts, model.config, "cpu")
    assert torch.equal(batch.patches, torch.cat([prompt.patches for prompt in prompts]))
    assert [tensor.numel() for tensor in sent if tensor.dtype == torch.uint8] == [144 * 14 * 14 * 3]
    # targets, and the position table's weights
    assert sum(tensor.numel() for tensor in sent if tensor.is_floating_point()) < 144 * 14


def test_a_device_makes_the_patches_by_the_kernels(monkeypatch) -> None:
    model, asked = small_model("qwen3_vl"), []

    def ask(images, *rest, **layout):
        asked.append(images)
        return patchify_images(images, *rest, **layout)

    monkeypatch.setattr(preprocess, "patchify_images", ask)
    prompts = [small_prompt(model, [(8, 12), (4, 4)], words=4, seed=seed) for seed in range(2)]
    batch = PromptBatch.of(prompts, model.config, "meta")
    assert [list(image.shape) for image in asked[0]] == [[128, 192, 3], [64, 64, 3]] * 2
    assert batch.patches.shape == (224, 1536)
    assert batch.patches.is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_patches_made_on_the_gpu() -> None:
    model = small_model("qwen2_5_vl")
    prompts = [
        small_prompt(model, grids, words=4, seed=seed)
        for seed, grids in enumerate([[(8, 12), (4, 4)], [], [(4, 8)]])
    ]
    there, here = (PromptBatch.of(prompts, model.config, device).patches for device in ("cuda", "cpu"))
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-6)


def test_the_loader_works_while_the_step_does() -> None:
    """While a prompt is worked on, the `ahead` next ones are made, and no more."""
    made, all_made = [], threading.Event()

    def make(index: int) -> int:
        made.append(index)
        if len(made) == 21:
            all_made.set()
        return index

    prompts = prefetch(make, range(100), workers=2, ahead=20)
    assert next(prompts) == 0
    assert all_made.wait(10)
    assert sorted(made) == list(range(21))
    assert list(prompts) == list(range(1, 100))


@pytest.mark.parametrize(("extent", "resized"), [(None, (308, 196)), (1000, (308, 196)), (99, (160, 112))])
def test_boxes_go_to_the_frame_and_back(extent, resized) -> None:
    size, box = (500, 375), np.array([12.5, 30.0, 499.0, 375.0])
    scale = Frame(extent).scale(size, resized)
    there = box * scale
    ends = resized if extent is None else (extent, extent)
    np.testing.assert_allclose(there, [box[i] / size[i % 2] * ends[i % 2] for i in range(4)])
    assert (
        np.abs(np.round(there) / scale - box).max() <= 0.5 * max(size[0] / ends[0], size[1] / ends[1]) + 1e-9
    )


def test_frames_of_the_families() -> None:
    class Config:
        model_type = "qwen2_5_vl"

    assert frame_of(Config()) == Frame(None)
    Config.model_type = "qwen3_vl"
    assert frame_of(Config()) == Frame(1000)
    Config.model_type = "llama"
    with pytest.raises(UserError, match=r"llama.*qwen2_5_vl"):
        frame_of(Config())


def test_the_recipes_wording() -> None:
    assert THINK.format(units=Frame(None).units).startswith(
        "Image 1 is a full scene image. Image 2 is a cropped region from Image 1. Please find where Image 2 "
        "is located in Image 1, "
        "and output the bounding box as [x1, y1, x2, y2] in pixel coordinates."
    )
    assert "from 0 to 1000" in DIRECT.format(units=Frame(1000).units)


def test_a_prompt_reads_as_asked() -> None:
    tokenizer = build_tokenizer()
    model = build_model({token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL})
    spec = PatchSpec(8, 2, 2, (0.5,) * 3, (0.5,) * 3)
    prompter = Prompter(
        tokenizer,
        model.config,
        spec,
        style="direct",
        image_pixels=(96 * 96, 160 * 160),
        cue_pixels=(32 * 32, 48 * 48),
    )
    prompt = prompter(example(160, 112))
    text = tokenizer.decode(prompt.ids.tolist()).replace("<|image_pad|>", "")
    vision = "<|vision_start|><|vision_end|>"
    question = DIRECT.format(units=Frame(99).units)
    assert text == f"<|im_start|>user\n{vision}{vision}{question}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.grids.tolist()[0] == [1, 14, 20]
    torch.testing.assert_close(prompt.target, torch.tensor([10 / 160, 20 / 112, 50 / 160, 44 / 112]) * 99)
    assert prompt.position.shape == (3, len(prompt.ids))
