"""Random models of the real architectures at small width, and prompts for them."""

from __future__ import annotations

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from locus_fast.model.attention import use_attention, use_plain_attention
from locus_fast.model.families import interleave
from locus_fast.model.preprocess import PatchSpec
from locus_fast.model.prompts import Prompt

VOCABULARY, IMAGE, VIDEO, START, END = 320, 300, 301, 302, 303
CLASSES = {
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}


def small_model(family: str, seed: int = 0, **text_settings: int):
    """Float32, two query heads a key head, window attention or deep stack, and our attention. text_settings:
    of another language model."""
    config_class, model_class = CLASSES[family]
    text = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        "bos_token_id": 1,
        "eos_token_id": 2,
        **text_settings,
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": text["hidden_size"],
        "num_heads": 2,
        "intermediate_size": 64,
    }
    vision |= (
        {"fullatt_block_indexes": [1], "window_size": 56}
        if family == "qwen2_5_vl"
        else {"deepstack_visual_indexes": [0, 1]}
    )
    torch.manual_seed(seed)
    tokens = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    model = model_class(config_class(text_config=text, vision_config=vision, **tokens)).float()
    # the default initialisation is so small that attention is nearly uniform and hides errors
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(3.0)
    use_attention(model)
    return model


def small_prompt(model, grids: list[tuple[int, int]], words: int, seed: int, image: int = IMAGE) -> Prompt:
    """A prompt with images of these (rows, columns) of patches, and `words` random tokens in each text
    piece."""
    rng = torch.Generator().manual_seed(seed)
    vision = model.config.vision_config
    merge, patch = vision.spatial_merge_size, vision.patch_size
    spec = PatchSpec(patch, vision.temporal_patch_size, merge, (0.5,) * 3, (0.3,) * 3)
    before, after = torch.randint(3, 290, (2, words), generator=rng).tolist()
    pieces = [[*before, START], *[[END, START]] * (len(grids) - 1), [END, *after]] if grids else [before]
    ids, position = interleave(pieces, [(h // merge, w // merge) for h, w in grids], image)
    pixels = torch.randint(
        0, 256, (sum(h * w for h, w in grids) * patch**2 * 3,), generator=rng, dtype=torch.uint8
    )
    grid = torch.tensor([(1, h, w) for h, w in grids], dtype=torch.int64).view(-1, 3)
    return Prompt(
        ids,
        position,
        pixels,
        grid,
        spec,
        torch.tensor([1.0, 2.0, 30.0, 40.0]),
        torch.ones(4),
        "small",
        f"prompt {seed}",
    )


def naive_logprob(model, prompts: list[Prompt], replies: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Log-probabilities of each reply's tokens by plain transformers: the whole prompt and its images again
    for every reply, one row at a time."""
    use_plain_attention(model, "sdpa")
    out = []
    for prompt, group in zip(prompts, replies, strict=True):
        for reply in group:
            ids = torch.cat([prompt.ids, reply])[None]
            is_image = (ids == model.config.image_token_id).int()
            images = (
                {"pixel_values": prompt.patches, "image_grid_thw": prompt.grids} if len(prompt.grids) else {}
            )
            position, _ = model.model.get_rope_index(
                ids, mm_token_type_ids=is_image, image_grid_thw=prompt.grids if images else None
            )
            logits = model(
                input_ids=ids, position_ids=position, mm_token_type_ids=is_image, use_cache=False, **images
            ).logits[0]
            predicting = logits[len(prompt.ids) - 1 : -1].log_softmax(-1)
            out.append(predicting.gather(-1, reply[:, None])[:, 0])
    use_attention(model)
    return out
