"""The example of `kernels/README.md` runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

from locus_fast.tiny.tokenizer import build_tokenizer


def test_the_example_runs() -> None:
    text = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    names = {"tokenizer": build_tokenizer()}
    exec(code.group(1), names)
    assert names["patches"].shape[0] == int(names["grid_thw"].prod(1).sum())  # type: ignore[attr-defined]
    assert names["weight"].grad is not None  # type: ignore[attr-defined]
