"""A model's folder on photographs: how a run is asked for, and a way to spoil a file of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.published import PHOTOGRAPHS

DATA = str(PHOTOGRAPHS / "instances.json")
RECIPE = [
    "--image-pixels",
    "4096",
    "12544",
    "--cue-pixels",
    "1024",
    "3136",
    "--eval-cues",
    "1",
    "--device",
    "cpu",
    "--mix",
    "1",
    "1",
    "1",
]
SIZES = [
    "--steps",
    "1",
    "--prompts",
    "2",
    "--group-size",
    "2",
    "--max-new-tokens",
    "3",
    "--microbatch-tokens",
    "4000",
]
Spoil = Callable[[Path], Any]


def fields(name: str, **changes: Any) -> Spoil:
    """Changes fields of a JSON file; None takes one away."""

    def spoil(folder: Path) -> None:
        content = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(
            json.dumps({key: value for key, value in content.items() if value is not None})
        )

    return spoil
