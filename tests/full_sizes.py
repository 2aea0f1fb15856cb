"""The published sizes of the models that presets name, in each family's own form of config.json."""

from __future__ import annotations

from typing import Any

from tests.published import config_of

QWEN25_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
QWEN25_VISION |= {"window_size": 112}
QWEN3_VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "deepstack_visual_indexes": [5, 11, 17],
}
# model: (family, its text sizes, its vision sizes)
SIZES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2.5-vl-7b": (
        "qwen2.5-vl",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        }
        | {"vocab_size": 152064},
        {**QWEN25_VISION, "out_hidden_size": 3584},
    ),
    "qwen2.5-vl-3b": (
        "qwen2.5-vl",
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
        }
        | {"vocab_size": 151936, "tie_word_embeddings": True},
        {**QWEN25_VISION, "out_hidden_size": 2048},
    ),
    "mimo-vl-7b": (
        "mimo-vl",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
        | {"vocab_size": 151680},
        {**QWEN25_VISION, "intermediate_size": 3456, "out_hidden_size": 4096},
    ),
    "qwen3-vl-4b": (
        "qwen3-vl",
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
        | {"vocab_size": 151936, "head_dim": 128},
        {**QWEN3_VISION, "num_position_embeddings": 2304, "out_hidden_size": 2560},
    ),
}


def full_config(model: str) -> dict[str, Any]:
    """The config.json of a model of SIZES; its special tokens are those of the small tokenizer."""
    family, text, vision = SIZES[model]
    config = config_of(family)
    config["vision_config"] |= vision
    language = config.get("text_config", config)
    language |= text
    language["rope_scaling"] |= {"mrope_section": [24, 20, 20] if family == "qwen3-vl" else [16, 24, 24]}
    return config
