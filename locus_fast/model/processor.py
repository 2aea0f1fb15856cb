"""A model's own image processor: where its config lies, and the fewest and most pixels that it resizes images
to.

`transformers` takes the image processor's part of processor_config.json, where newer versions save it, else
preprocessor_config.json. Limits are spelled min_pixels and max_pixels, or as edges of `size`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from locus_fast.errors import UserError

WITHIN, ALONE = "processor_config.json", "preprocessor_config.json"
PART = "image_processor"  # of the first
SPELLINGS = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
NAMES, EDGES = zip(*SPELLINGS, strict=True)
DEFAULTS = (56 * 56, 28 * 28 * 1280)  # where a config gives none


def processor_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """(file, content) of the config that `transformers` takes. Raises UserError if it cannot be read."""
    path = folder / WITHIN
    try:
        stated = json.loads(path.read_text(encoding="utf-8")).get(PART) if path.is_file() else None
        if stated is None:
            path = folder / ALONE
            stated = json.loads(path.read_text(encoding="utf-8"))
        return path, dict(stated)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} must be readable JSON with image_mean and image_std: {error}.") from None


def _size(stated: dict[str, Any]) -> dict[str, Any]:
    size = stated.get("size")
    return size if isinstance(size, dict) else {}


def own_limits(folder: Path) -> tuple[int, int]:
    """The fewest and the most pixels of a folder's image processor. Raises UserError if they are no such
    numbers."""
    path, stated = processor_config(folder)
    found = []
    for (name, edge), default in zip(SPELLINGS, DEFAULTS, strict=True):
        places = (stated.get(name), _size(stated).get(edge), _size(stated).get(name))
        value = next((value for value in places if value is not None), default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 1 <= value < 2**63:
            raise UserError(f"{path}: {name} is {json.dumps(value)}, and must be a number of pixels above 0.")
        found.append(int(value))
    return found[0], found[1]


def write_limits(folder: Path, limits: tuple[int, int]) -> None:
    """Puts these fewest and most pixels into the configs of a folder's image processor, as each spells
    them."""
    for path, part in ((folder / WITHIN, PART), (folder / ALONE, None)):
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        stated = content.get(part) if part else content
        if not stated:
            continue
        edges = _size(stated).keys() & {*NAMES, *EDGES}
        if edges:
            kept = {key: value for key, value in stated["size"].items() if key not in NAMES}
            stated["size"] = {**kept, **dict(zip(EDGES, limits, strict=True))}
        if not edges or stated.keys() & {*NAMES}:
            stated |= dict(zip(NAMES, limits, strict=True))
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
