"""Changes of a model's config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tests.published import config_of

OLD, NEW = "qwen2.5-vl", "qwen3-vl"  # flat and nested configs
BOTH = (OLD, NEW)
Change = Callable[[dict[str, Any]], Any]


def text(**values: Any) -> Change:
    """Sets keys of the language model's part, wherever the family publishes it; None takes one away."""
    return lambda config: put(config.get("text_config", config), values)


def vision(**values: Any) -> Change:
    return lambda config: put(config["vision_config"], values)


def rotary(**values: Any) -> Change:
    return lambda config: put(config.get("text_config", config)["rope_scaling"], values)


def put(part: dict[str, Any], values: dict[str, Any]) -> None:
    part.update(values)
    for key in [key for key, value in values.items() if value is None]:
        del part[key]


def read_config(folder: Path, family: str, change: Change) -> Any:
    """transformers' reading of a family's config.json after a change."""
    stated = config_of(family)
    change(stated)
    (folder / "config.json").write_text(json.dumps(stated))
    return AutoConfig.from_pretrained(folder)
