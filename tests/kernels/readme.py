"""The examples of `kernels/README.md`."""

from __future__ import annotations

import re

from tests.kernels.interpreter import ROOT


def examples() -> list[str]:
    """The Python examples as printed, in order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "kernels" / "README.md").read_text(), re.DOTALL)
