"""Frames, the resize rule and patches against the image processor of transformers, and prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from locus_fast.errors import UserError
from locus_fast.families import Frame, frame_of
from locus_fast.preprocess import PatchSpec, grid_size
from locus_fast.prompts import DIRECT, THINK, Prompter
from locus_fast.tiny.model import build_model
from locus_fast.tiny.tokenizer import SPECIAL, build_tokenizer
from locus_fast.types import Example

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
            assert grid_size(height, width, factor=factor, min_pixels=56 * 56, max_pixels=1280 * 784) == expected


@pytest.mark.parametrize(("width", "height"), [(97, 61), (500, 375), (41, 300)])
def test_pixels_and_grids_equal_the_image_processor(width: int, height: int) -> None:
    tokenizer = build_tokenizer()
    model = build_model({token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL})
    prompter = Prompter(tokenizer, model.config, SPEC, question="think", image_pixels=(3136, 100352), cue_pixels=(3136, 100352))
    task = example(width, height)
    prompt = prompter(task)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 100352})
    expected = processor([task.image, task.cue], return_tensors="pt")
    assert torch.equal(prompt.grids, expected["image_grid_thw"])
    torch.testing.assert_close(prompt.patches, expected["pixel_values"], rtol=0, atol=1e-5)
    assert int((prompt.ids == prompter.placeholder).sum()) == int(prompt.grids.prod(1).sum()) // 4


@pytest.mark.parametrize(("extent", "resized"), [(None, (308, 196)), (1000, (308, 196)), (99, (160, 112))])
def test_boxes_go_to_the_frame_and_back(extent, resized) -> None:
    size, box = (500, 375), np.array([12.5, 30.0, 499.0, 375.0])
    scale = Frame(extent).scale(size, resized)
    there = box * scale
    ends = resized if extent is None else (extent, extent)
    np.testing.assert_allclose(there, [box[i] / size[i % 2] * ends[i % 2] for i in range(4)])
    assert np.abs(np.round(there) / scale - box).max() <= 0.5 * max(size[0] / ends[0], size[1] / ends[1]) + 1e-9


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
        "Image 1 is a full scene image. Image 2 is a cropped region from Image 1. Please find where Image 2 is located in Image 1, "
        "and output the bounding box as [x1, y1, x2, y2] in pixel coordinates."
    )
    assert "from 0 to 1000" in DIRECT.format(units=Frame(1000).units)


def test_a_prompt_reads_as_asked() -> None:
    tokenizer = build_tokenizer()
    model = build_model({token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL})
    spec = PatchSpec(8, 2, 2, (0.5,) * 3, (0.5,) * 3)
    prompter = Prompter(tokenizer, model.config, spec, question="direct", image_pixels=(96 * 96, 160 * 160), cue_pixels=(32 * 32, 48 * 48))
    prompt = prompter(example(160, 112))
    text = tokenizer.decode(prompt.ids.tolist()).replace("<|image_pad|>", "")
    vision = "<|vision_start|><|vision_end|>"
    assert text == f"<|im_start|>user\n{vision}{vision}{DIRECT.format(units=Frame(99).units)}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.grids.tolist()[0] == [1, 14, 20]
    torch.testing.assert_close(prompt.target, torch.tensor([10 / 160, 20 / 112, 50 / 160, 44 / 112]) * 99)
    assert prompt.position.shape == (3, len(prompt.ids))
