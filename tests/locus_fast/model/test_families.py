"""What a family's own processor makes of a prompt is what we make of it: tokens, grids, positions, pixels;
and boxes go to its frame and back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from locus_kernels.box_reward import build_token_table, read_boxes
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from locus_fast.config import PRESETS, parse
from locus_fast.data.example import Example
from locus_fast.data.resize import grid_size
from locus_fast.model import families
from locus_fast.model.families import FAMILIES as RECORDS
from locus_fast.model.families import Frame, family_of
from locus_fast.model.preprocess import PatchSpec, patches_of
from locus_fast.model.prompts import PROMPT_STYLES, Prompter, template_pieces
from locus_fast.weights.checkpoint import load_model
from tests.published import FAMILIES, TEMPLATES, write_checkpoint

REPLY = "it is in the corner\n</think>\n\n<answer>[1, 2, 30, 40]</answer><|im_end|>"
SIZES = [(97, 61), (333, 251), (41, 300), (640, 427), (29, 31)]  # (width, height)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory) -> tuple[Path, Any, Any]:
    folder = write_checkpoint(tmp_path_factory.mktemp("families") / request.param, request.param)
    return folder, *load_model(folder, torch.device("cpu"))


def processor_of(folder: Path, model: Any, tokenizer: Any) -> Any:
    """The family's processor, with the PIL image processor that all share; its constructor insists on a video
    processor, which needs torchvision."""
    base = Qwen3VLProcessor if model.config.model_type == "qwen3_vl" else Qwen2_5_VLProcessor

    class WithoutVideo(base):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return (
                None
                if argument_name == "video_processor"
                else super().check_argument_for_proper_class(argument_name, argument)
            )

    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    return WithoutVideo(
        Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer, None, chat_template=template
    )


def photograph(width: int, height: int) -> np.ndarray:
    return np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_published(processor: Any, model: Any, images: list[np.ndarray], text: str) -> dict[str, torch.Tensor]:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(
        images=[Image.fromarray(image) for image in images], text=[prompt], return_tensors="pt"
    )
    position, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
    )
    return {**inputs, "position": position[:, 0]}


def prompter_of(folder: Path, model: Any, tokenizer: Any) -> Prompter:
    size = Qwen2VLImageProcessorPil.from_pretrained(folder).size
    limits = (size["shortest_edge"], size["longest_edge"])
    return Prompter(
        tokenizer,
        model.config,
        PatchSpec.of(model.config, folder),
        style="think",
        image_pixels=limits,
        cue_pixels=limits,
    )


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_two_images(loaded, index: int) -> None:
    model, prompter = loaded[1], prompter_of(*loaded)
    image, cue = photograph(*SIZES[index]), photograph(*SIZES[index - 1])
    prompt = prompter(Example(image, cue, (1.0, 2.0, 20.0, 21.0), "small", "random"))
    expected = as_published(
        processor_of(*loaded),
        model,
        [image, cue],
        PROMPT_STYLES["think"].text.format(units=prompter.frame.units),
    )
    assert torch.equal(prompt.ids, expected["input_ids"][0])
    assert torch.equal(prompt.grids, expected["image_grid_thw"])
    assert torch.equal(prompt.position, expected["position"])
    torch.testing.assert_close(prompt.patches, expected["pixel_values"], rtol=0, atol=1e-5)
    assert (prompt.target / prompt.scale - torch.tensor([1.0, 2.0, 20.0, 21.0])).abs().max() < 0.5
    rows, columns = (int(side) * prompter.spec.patch for side in prompt.grids[0, 1:])
    ends = (columns, rows) if prompter.frame.extent is None else (1000, 1000)
    torch.testing.assert_close(prompt.scale[:2] * torch.tensor(SIZES[index]), torch.tensor(ends).float())


@pytest.mark.parametrize(
    ("size", "limits"),
    [((900, 31), (3136, 9000)), ((30, 900), (100_000, 200_000)), ((500, 375), (65536, 65600))],
)
def test_image_and_cue_have_limits_of_their_own(
    loaded, size: tuple[int, int], limits: tuple[int, int]
) -> None:
    """Each is what the image processor makes of it by itself under its limits."""
    folder, model, tokenizer = loaded
    of_cue, spec = (1024, 4096), PatchSpec.of(model.config, folder)
    prompter = Prompter(tokenizer, model.config, spec, style="direct", image_pixels=limits, cue_pixels=of_cue)
    image, cue = photograph(*size), photograph(47, 33)
    prompt = prompter(Example(image, cue, (1.0, 2.0, 20.0, 21.0), "small", "random"))
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    alone = [
        processor(
            Image.fromarray(each), return_tensors="pt", size={"shortest_edge": least, "longest_edge": most}
        )
        for each, (least, most) in ((image, limits), (cue, of_cue))
    ]
    assert torch.equal(prompt.grids, torch.cat([each["image_grid_thw"] for each in alone]))
    torch.testing.assert_close(
        prompt.patches, torch.cat([each["pixel_values"] for each in alone]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("size", SIZES)
def test_one_image(loaded, size: tuple[int, int]) -> None:
    """As the trained checkpoint is asked afterwards."""
    _, model, tokenizer = loaded
    prompter, family = prompter_of(*loaded), family_of(model.config)
    image, text = photograph(*size), "What is written on the sign? Answer A, B or C."
    (least, most), spec = prompter.pixels[0], prompter.spec
    resized = family.resize(image, factor=spec.factor, min_pixels=least, max_pixels=most)
    rows, columns = resized.shape[0] // spec.factor, resized.shape[1] // spec.factor
    pieces = template_pieces(tokenizer, text, 1, prompter.placeholder)
    ids, position = family.positions(pieces, [(rows, columns)], prompter.placeholder)
    expected = as_published(processor_of(*loaded), model, [image], text)
    assert torch.equal(ids, expected["input_ids"][0])
    assert torch.equal(position, expected["position"])
    patches = patches_of(torch.from_numpy(resized.flatten()), expected["image_grid_thw"], spec)
    torch.testing.assert_close(patches, expected["pixel_values"], rtol=0, atol=1e-5)


def test_the_template_is_the_processors(loaded) -> None:
    """Not the tokenizer's own, which may know no images."""
    folder, _, tokenizer = loaded
    assert tokenizer.chat_template == TEMPLATES[folder.name]
    (folder / "chat_template.jinja").write_text("{{ 'newer' }}")
    assert load_model(folder, torch.device("cpu"))[1].chat_template == "{{ 'newer' }}"
    (folder / "chat_template.jinja").unlink()


def test_the_opening_of_a_thinking_template(loaded) -> None:
    """Qwen3-VL Thinking's generation prompt ends in `<think>` and a line break, so the format is read from
    there; the others' replies say it."""
    folder, model, tokenizer = loaded
    prompter = prompter_of(*loaded)
    thinking = folder.name == "qwen3-vl"
    assert tokenizer.decode(prompter.pieces[2]).endswith(
        "assistant\n<think>\n" if thinking else "assistant\n"
    )
    assert tokenizer.decode(prompter.opening) == ("<think>" if thinking else "")
    table = build_token_table(tokenizer, model.lm_head.weight.shape[0])
    for text, well_formed in ((f"<think>\n{REPLY}", not thinking), (REPLY, thinking)):
        whole = torch.tensor([[*prompter.opening, *tokenizer.encode(text, add_special_tokens=False)]])
        reading = read_boxes(
            whole,
            torch.tensor([whole.shape[1]]),
            table,
            which=PROMPT_STYLES["think"].which,
            grammar="think_answer",
        )
        assert reading.box.tolist() == [[1.0, 2.0, 30.0, 40.0]]
        assert reading.format_ok.item() or not well_formed  # the format allows a second <think>
        assert thinking or reading.format_ok.item() == well_formed


def test_the_presets_differ_in_the_model_alone() -> None:
    names = ("qwen2.5-vl-7b", "qwen3-vl-4b", "mimo-vl-7b")
    assert all(PRESETS[name].keys() == {"model"} for name in names)
    assert {parse(["--preset", name]).model for name in names} == {PRESETS[name]["model"] for name in names}


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    size=st.tuples(st.integers(28, 2000), st.integers(28, 2000)),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    limits=st.sampled_from([(3136, 12845056), (262144, 1048576), (65536, 16777216)]),
    name=st.sampled_from(sorted(RECORDS)),
)
def test_boxes_go_to_the_frame_and_back(size, corners, limits, name: str) -> None:
    """Unrounded: half a pixel is far more than float32 loses. The frame's edges are the resized image's, or 0
    and 1000."""
    factor, frame = {"qwen2_5_vl": 28, "qwen3_vl": 32}[name], Frame(RECORDS[name].extent)
    rows, columns = grid_size(size[1], size[0], factor=factor, min_pixels=limits[0], max_pixels=limits[1])
    scale = frame.scale(size, (columns, rows)).astype(np.float32)
    box = np.array([corners[i] * size[i % 2] for i in range(4)])
    there = box.astype(np.float32) * scale
    assert np.abs(there / scale - box).max() < 0.5
    ends = np.array([columns, rows] if frame.extent is None else [1000, 1000])
    np.testing.assert_allclose(np.array([*size]) * scale[:2], ends, rtol=1e-6)
    spoken = np.rint(there)  # a model says whole numbers: that loses half a step of the frame
    assert (np.abs(spoken / scale - box) <= 0.5 / scale + 1e-2).all()


def test_the_docstring_names_every_module_that_knows_an_architecture() -> None:
    """Those that name a part of one, a family, or its placeholder: adding a record to FAMILIES does not
    change them."""
    package = Path(families.__file__).parents[1]
    known = re.compile(r"language_model|\bvisual\b|qwen2_5_vl|qwen3_vl|image_token_id")
    files = [
        file for file in package.rglob("*.py") if "tiny" not in file.parts and known.search(file.read_text())
    ]
    names = {str(file.relative_to(package)) for file in files} - {"model/families.py"}
    assert {"cost/shapes.py", "model/policy.py", "model/fused.py"} <= names
    assert {name for name in names if f"`{name}`" not in families.__doc__} == set()
