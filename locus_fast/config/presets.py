"""What a preset, a loss or an earlier version's name stands for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locus_fast.files import read_object

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "steps": 60,
        "prompt_style": "direct",
        "mix": (0.5, 0.5, 0.0),
        "image_pixels": (96 * 96, 160 * 160),
        "cue_pixels": (32 * 32, 48 * 48),
        "prompts": 24,
        "max_new_tokens": 16,
        "lr": 1e-4,
        "microbatch_tokens": 12288,
        "checkpointing": 0,
        "workers": 1,
        "eval_cues": 384,
    },
    "paper": {},
    "qwen2.5-vl-7b": {"model": "Qwen/Qwen2.5-VL-7B-Instruct"},
    "qwen3-vl-4b": {"model": "Qwen/Qwen3-VL-4B-Thinking"},
    "mimo-vl-7b": {"model": "XiaomiMiMo/MiMo-VL-7B-RL"},
}

# Settings that a loss is published with; they hold unless they are given themselves.
LOSS_SETTINGS: dict[str, dict[str, Any]] = {
    # Liu et al., arXiv 2503.20783
    "dr_grpo": {
        "loss_agg": "seq-mean-token-sum-norm",
        "normalize_std": False,
    },
    "bnpo": {"loss_agg": "token-mean"},
    "dapo": {"loss_agg": "token-mean"},  # Yu et al., arXiv 2503.14476
    "gspo": {"loss_agg": "seq-mean-token-mean"},  # Zheng et al., arXiv 2507.18071: a mean over replies
}

# Names of earlier versions: refused on a command line with the new name, read in a run's settings.
RENAMED = {
    "question": "prompt_style",
    "replies": "group_size",
    "max_tokens": "max_new_tokens",
    "mean": "loss_agg",
    "kl": "kl_coef",
    "updates": "updates_per_batch",
    "rates": "lr_scale",
    "schedule": "lr_schedule",
    "warmup": "warmup_ratio",
    "grad_clip": "max_grad_norm",
    "tokens": "microbatch_tokens",
}
RENAMED_VALUES = {"loss_agg": {"token": "token-mean", "sequence": "seq-mean-token-mean"}}


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run of an earlier version under today's names."""
    renamed = {RENAMED.get(name, name): value for name, value in settings.items()}
    for name, values in RENAMED_VALUES.items():
        if isinstance(renamed.get(name), str):
            renamed[name] = values.get(renamed[name], renamed[name])
    return renamed


def default_preset(model: str) -> str:
    """The preset of a model, or of adapters, that is named without one; a hub id, or a folder that loading
    will complain about, has the paper's."""
    if model and may_hold_adapters(model):
        model = str(read_object(Path(model) / "adapter_config.json").get("base_model_name_or_path") or model)
    return "tiny" if not model or "coordinate_extent" in read_object(Path(model) / "config.json") else "paper"


def may_hold_adapters(model: str) -> bool:
    """Whether a model may turn out to be adapters: the embedded base, and a folder with a model's config, are
    none."""
    return bool(model) and not os.path.isfile(Path(model) / "config.json")
