"""Metrics of a run without its clock."""

from __future__ import annotations

import json
from pathlib import Path


def timeless(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith(("seconds", "_per_s"))} for row in rows]
