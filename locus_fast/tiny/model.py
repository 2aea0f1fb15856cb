"""The embedded model: a Qwen3-VL of 1.6M parameters, with what a model so small needs and a large one does
not.

That is a sine/cosine position table and weights initialised at fan-in scale: with the usual 0.02 it stays on
a plateau for hours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from locus_fast.tiny.tokenizer import VOCABULARY

PATCH, MERGE = 8, 2  # pixels of a patch; patches of a language token, on a side
CELL = PATCH * MERGE
TABLE_SIDE = 20  # patches of the position table's side
EXTENT = 99  # coordinates are 0..99, two digits


def build_model(special: dict[str, int]) -> Qwen3VLForConditionalGeneration:
    """The untrained model. special: the tokenizer's ids of Qwen's special tokens."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special["<|endoftext|>"],
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_heads": 3,
        "out_hidden_size": 128,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "num_position_embeddings": TABLE_SIDE**2,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=False,
        coordinate_extent=EXTENT,  # type: ignore[call-arg]
    )
    model = Qwen3VLForConditionalGeneration(config)
    for name, p in model.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(p, std=1.0)
        elif p.ndim >= 2:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    model.model.visual.pos_embed.weight.data.copy_(position_table(vision["hidden_size"]))
    return model


def position_table(width: int) -> Tensor:
    """Sine and cosine of row and column at `width // 4` frequencies, float32 [TABLE_SIDE**2, width]."""
    omega = 1.5 * torch.exp(-torch.arange(width // 4) / (width // 4) * math.log(50.0))
    y, x = (
        t.flatten().float()
        for t in torch.meshgrid(torch.arange(TABLE_SIDE), torch.arange(TABLE_SIDE), indexing="ij")
    )
    return 0.5 * torch.cat([f(t[:, None] * omega) for t in (y, x) for f in (torch.sin, torch.cos)], 1)
