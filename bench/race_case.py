"""What both runners of the race get: a model with a real one's proportions, the same images, the same two
prompts, and how FLOPs are counted.

A real 7B spends nine parts in its layers to one in its head and about a fifth of a prompt's work in its
vision tower. So does this one, at width 256: with a real vocabulary on a tiny trunk the head would be all of
it. Replies are forced to their full length, because a random model's are noise: the tokens that could end one
are never drawn.

Legend: B prompts, G replies of each, L tokens of each reply, R = B * G rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from locus_fast.data.example import Example
from locus_fast.model.preprocess import PatchSpec
from locus_fast.model.prompts import Prompt, Prompter
from locus_fast.step.vocabulary import Vocabulary
from locus_fast.tiny.tokenizer import build_tokenizer

PROMPTS, GROUP, LENGTH = 2, 8, 32
VOCABULARY = 4_000
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PIXELS = (28 * 28, 1024 * 1024)  # fewest and most of an image or cue: nothing here is resized far
LEARNING_RATE, KL = 1e-5, 0.01
# (height, width) of each prompt's image and cue
SIZES = {
    "896x896": [((896, 896), (280, 280))] * PROMPTS,
    "mixed sizes": [((896, 896), (280, 280)), ((640, 512), (168, 112))],
}
FAMILIES = {
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        {"fullatt_block_indexes": [3], "window_size": 112, "depth": 4},
    ),
    "qwen3_vl": (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        {"deepstack_visual_indexes": [0], "num_position_embeddings": 2304, "depth": 2},
    ),
}


def race_tokenizer() -> Any:
    """The tiny tokenizer with made-up words, up to VOCABULARY tokens, padded on the left as generation wants
    it."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<word {n}>" for n in range(VOCABULARY - len(tokenizer))])
    tokenizer.padding_side = "left"
    return tokenizer


def race_model(family: str, tokenizer: Any) -> Any:
    """Random float32 weights; hidden 256, 8 layers, two query heads a key head; 9.4M parameters in the
    layers, 1.0M in the head."""
    config_class, model_class, vision = FAMILIES[family]
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 1280,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = vision | {"hidden_size": 64, "intermediate_size": 192, "num_heads": 2, "out_hidden_size": 256}
    names = {
        "image_token_id": "image_pad",
        "video_token_id": "video_pad",
        "vision_start_token_id": "vision_start",
        "vision_end_token_id": "vision_end",
    }
    tokens = {name: tokenizer.convert_tokens_to_ids(f"<|{text}|>") for name, text in names.items()}
    torch.manual_seed(0)
    return model_class(
        config_class(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    ).float()


class Case:
    """One course of the race: model folder, tokenizer, examples, and which tokens a reply may hold."""

    def __init__(self, family: str, sizes: str, folder: Path):
        self.family, self.folder = family, folder
        self.tokenizer = race_tokenizer()
        model = race_model(family, self.tokenizer)
        model.save_pretrained(folder)
        vision = model.config.vision_config
        self.spec = PatchSpec(
            vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, MEAN, STD
        )
        self.prompter = Prompter(
            self.tokenizer, model.config, self.spec, style="direct", image_pixels=PIXELS, cue_pixels=PIXELS
        )
        self.allowed = Vocabulary.of(model, self.tokenizer).allowed.clone()
        self.allowed[[self.tokenizer.eos_token_id, self.tokenizer.pad_token_id]] = False
        rng = np.random.default_rng(0)
        self.examples = [example(rng, image, cue) for image, cue in SIZES[sizes]]

    def load(self) -> Any:
        """A fresh copy of the model, as plain transformers loads it."""
        return FAMILIES[self.family][1].from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="sdpa"
        )


def example(rng: np.random.Generator, image: tuple[int, int], cue: tuple[int, int]) -> Example:
    """A noise image of (height, width) `image` and its top left corner, `cue` large."""
    pixels = rng.integers(0, 256, (*image, 3), dtype=np.uint8)
    return Example(
        pixels, pixels[: cue[0], : cue[1]].copy(), (0.0, 0.0, float(cue[1]), float(cue[0])), "small", "noise"
    )


def luck(rows: int) -> torch.Tensor:
    """A share of the reward, float32 [rows], that differs within a group: random replies hold no box, and
    equal rewards would have no gradient."""
    return torch.arange(rows) % GROUP / GROUP


def attention_flops(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Both products of attention from the shapes [S, H, N, D], masked or not, as the counter does for a GPU's
    attention."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def attention_backward_flops(
    _: Any, q: Sequence[int], k: Sequence[int], v: Sequence[int], *__: Any, out_shape: Any = None, **___: Any
) -> int:
    """Five products: the weights again, and the gradients of weights, values, queries and keys."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


def count_flops(step: Callable[[], Any]) -> int:
    """Operations of the matrix products in `step()`, the CPU's attention included, which the counter passes
    over by default."""
    aten = torch.ops.aten
    cpu_attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        step()
    return counter.get_total_flops()


def floor_flops(model: Any, prompts: Sequence[Prompt], kl: bool) -> tuple[int, int]:
    """What a step cannot do without: (vision tower, prompts and replies once forward and twice backward, and
    once more for a reference; the one pass over the replies that decoding them is).

    As the counter has it, attention costs all of its rectangle, masked or not; a reply's is L queries by P +
    L keys. model: plain transformers, as `Case.load` gives it.
    """
    core, text, prefix, suffix = model.model, model.config.text_config, 0, 0
    weights = sum(p.numel() for p in core.language_model.layers.parameters() if p.ndim == 2)
    width = text.num_attention_heads * text.head_dim
    for prompt in prompts:
        is_image = (prompt.ids[None] == model.config.image_token_id).int()
        images = {"pixel_values": prompt.patches, "image_grid_thw": prompt.grids}
        with torch.no_grad():
            prefix += count_flops(
                partial(
                    core, input_ids=prompt.ids[None], mm_token_type_ids=is_image, use_cache=False, **images
                )
            )
        suffix += GROUP * LENGTH * 2 * (weights + model.lm_head.weight.numel())
        suffix += GROUP * LENGTH * 4 * (len(prompt.ids) + LENGTH) * width * text.num_hidden_layers
    return (prefix + suffix) * (4 if kl else 3), suffix
