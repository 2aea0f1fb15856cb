"""Small random checkpoints that lie as the published ones do: config.json in each family's own form, tensor
names, shards, tokenizer and templates.

The names and the forms of the configs are those of Qwen2.5-VL-7B-Instruct, Qwen3-VL-4B-Thinking and
MiMo-VL-7B-RL; the templates keep the published ones' structure (default system turn, vision tokens around
each image, how the reply is opened), not their text.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText

from locus_fast.model.prompts import PROMPT_STYLES

PHOTOGRAPHS = Path(__file__).parent / "photos"  # real ones, with boxes
SPECIAL = [
    *(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|box_start|>",
        "<|box_end|>",
    ),
    *(
        "<|quad_start|>",
        "<|quad_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
]
PLAIN = ["<think>", "</think>"]  # added tokens that are text
TURNS = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' or 'image_url' in part %}{{- '<|vision_start|><|image_pad|><|vision_end|>' "
    "}}"
    "{%- elif 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
)
SYSTEM = "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nNAME<|im_end|>\n' }}{%- endif %}"
OPENING = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\nTHINK' }}{%- endif %}"
TEXT_ONLY = "{%- for message in messages %}{{- message.role + ': ' + message.content }}{%- endfor %}"


def template(name: str, thinking: bool) -> str:
    system = SYSTEM.replace("NAME", name) if name else ""
    return system + TURNS + OPENING.replace("THINK", "<think>\n" if thinking else "")


TEMPLATES = {
    "qwen2.5-vl": template("You are a helpful assistant.", thinking=False),
    "qwen3-vl": template("", thinking=True),
    "mimo-vl": template("You are an assistant named MiMo.", thinking=False),
}
FAMILIES = tuple(TEMPLATES)
MEAN_STD = {"qwen3-vl": ([0.5] * 3, [0.5] * 3)}
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


@functools.cache
def bpe() -> Tokenizer:
    """Byte-level BPE of a few hundred tokens with the pre-tokenisation of Qwen and its added tokens."""
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(words), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator(
        [
            *(style.text for style in PROMPT_STYLES.values()),
            "You are a helpful assistant.",
            "system\n",
            "user\n",
        ],
        trainer,
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(PLAIN)
    return tokenizer


def config_of(family: str) -> dict[str, Any]:
    """config.json in the form in which the family publishes it: flat for Qwen2.5-VL and MiMo-VL, nested for
    Qwen3-VL."""
    tokens = {
        "image_token_id": bpe().token_to_id("<|image_pad|>"),
        "video_token_id": bpe().token_to_id("<|video_pad|>"),
        "vision_start_token_id": bpe().token_to_id("<|vision_start|>"),
        "vision_end_token_id": bpe().token_to_id("<|vision_end|>"),
    }
    text = {
        "bos_token_id": bpe().token_to_id("<|endoftext|>"),
        "eos_token_id": bpe().token_to_id("<|im_end|>"),
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_hidden_layers": 2 if family == "qwen2.5-vl" else 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05 if family == "mimo-vl" else 1e-06,
        "vocab_size": bpe().get_vocab_size() + 6,  # padded, as the published ones are
    }
    if family == "qwen3-vl":
        text |= {
            "model_type": "qwen3_vl_text",
            "dtype": "bfloat16",
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_theta": 5000000,
        }
        text |= {
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 3, 3], "rope_type": "default"}
        }
        vision = {
            "depth": 3,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
            "intermediate_size": 64,
            "patch_size": 16,
        }
        vision |= {
            "model_type": "qwen3_vl",
            "hidden_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "spatial_merge_size": 2,
        }
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            **tokens,
            "model_type": "qwen3_vl",
            "text_config": text,
            "tie_word_embeddings": True,
            "transformers_version": "4.57.0.dev0",
            "vision_config": {**vision, "temporal_patch_size": 2},
        }
    text |= {
        "rope_theta": 640000 if family == "mimo-vl" else 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    text |= {
        "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
        "use_sliding_window": False,
    }
    vision = {
        "depth": 3,
        "fullatt_block_indexes": [1],
        "window_size": 56,
        "intermediate_size": 60,
        "patch_size": 14,
        "spatial_patch_size": 14,
    }
    vision |= {
        "model_type": "qwen2_5_vl",
        "hidden_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "in_chans": 3,
        "spatial_merge_size": 2,
    }
    architecture = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "transformers_version": "4.41.2",
    }
    return {**architecture, **tokens, **text, "vision_config": {**vision, "tokens_per_second": 2}}


def published_name(name: str, family: str) -> str:
    """A tensor's name in the published files: Qwen2.5-VL and MiMo-VL keep the names from before both parts
    moved under `model`."""
    return (
        name
        if family == "qwen3-vl"
        else name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
    )


def write_checkpoint(folder: Path, family: str, shards: int = 3, seed: int = 0) -> Path:
    """The folder, filled."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(family), indent=2) + "\n")
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        # the default initialisation is so small that attention is nearly uniform and hides errors
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.1 if p.ndim >= 2 else 0.02) + (p.ndim < 2) * p)
    tied = "lm_head.weight" if family == "qwen3-vl" else ""
    tensors = {
        published_name(name, family): t.to(torch.bfloat16).contiguous()
        for name, t in model.state_dict().items()
        if name != tied
    }
    write_shards(folder, tensors, shards)
    write_files(folder, family)
    return folder


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    place = {name: names[i * shards // len(tensors)] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file(
            {name: tensors[name] for name in tensors if place[name] == file},
            folder / file,
            metadata={"format": "pt"},
        )
    size = sum(t.nbytes for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": place}, indent=2) + "\n"
    )


def write_files(folder: Path, family: str) -> None:
    """Everything but config and weights."""
    ids = {token: bpe().token_to_id(token) for token in (*SPECIAL, *PLAIN)}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    mean, std = MEAN_STD.get(family, CLIP)
    patch = config_of(family)["vision_config"]["patch_size"]
    limits = (
        {"size": {"shortest_edge": 4096, "longest_edge": 65536}}
        if family == "qwen3-vl"
        else {"min_pixels": 3136, "max_pixels": 65536}
    )
    preprocessor = {
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": mean,
        "image_std": std,
        **limits,
    }
    model = json.loads(bpe().to_str())["model"]
    files = {
        "generation_config.json": {
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "temperature": 0.1,
        },
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **preprocessor},
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(i): {"content": token, "special": token in SPECIAL, **plain} for token, i in ids.items()
            },
            "additional_special_tokens": SPECIAL[1:],
            "chat_template": TEXT_ONLY
            if family == "mimo-vl"
            else TEMPLATES[family],  # a processor's own template stands before the tokenizer's
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
        },
        "chat_template.json": {"chat_template": TEMPLATES[family]},
        "vocab.json": model["vocab"],
        **({"video_preprocessor_config.json": preprocessor} if family == "qwen3-vl" else {}),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False))
    (folder / "tokenizer.json").write_text(bpe().to_str())
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
