"""Run a file of kernel cases in its own process: under Triton's interpreter on CPU tensors, or as compiled
code on the GPU.

The interpreter is chosen when Triton is first imported and holds for the whole process, so no process can
both interpret and compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run_cases(file: str, interpret: bool, folder: str = "kernels") -> None:
    """Run the cases in tests/`folder`/`file`; they fail here with pytest's own report."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / folder / file),
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def device() -> str:
    """Where a file of cases puts its tensors. Skips the file when it is run by hand without a GPU and without
    TRITON_INTERPRET=1."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("set TRITON_INTERPRET=1, or run it on a machine with a GPU", allow_module_level=True)
    return "cuda"


def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every tensor that torch.empty makes with garbage: NaN, or the largest value of an integer type."""
    plain = torch.empty

    def poisoned(*args, **kwargs):
        made = plain(*args, **kwargs)
        return made.fill_(
            float("nan")
            if made.is_floating_point()
            else True
            if made.dtype == torch.bool
            else torch.iinfo(made.dtype).max
        )

    monkeypatch.setattr(torch, "empty", poisoned)
