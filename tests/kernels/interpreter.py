"""Run a file of kernel cases in its own process: under Triton's interpreter on CPU tensors, or as compiled
code on the GPU.

The interpreter is chosen when Triton is first imported and holds for the whole process, so no process can
both interpret and compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parents[2]

ON_THE_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WAYS = [  # of running a file of cases: the argument `interpret` of `run_cases`
    pytest.param(True, marks=pytest.mark.long, id="interpreter"),
    pytest.param(False, marks=ON_THE_GPU, id="gpu"),
]


def on_the_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a CUDA device."""
    for mark in ON_THE_GPU:
        test = mark(test)
    return test


class Outcome(NamedTuple):
    """What became of a case."""

    name: str
    failure: str  # pytest's report; "" for a case that passed
    skipped: str  # why; "" for a case that ran


def run_cases(
    file: str | Path, interpret: bool, folder: str = "kernels", subtests: pytest.Subtests | None = None
) -> None:
    """Run the cases in tests/`folder`/`file`. Each is reported as a subtest of its own name; without
    `subtests`, one failure names all that failed."""
    outcomes = _outcomes(ROOT / "tests" / folder / file, interpret)
    if subtests is None:
        failed = {case.name: case.failure for case in outcomes if case.failure}
        assert not failed, f"{', '.join(failed)}\n" + "\n".join(failed.values())
        return
    for case in outcomes:
        with subtests.test(case.name):
            if case.failure:
                pytest.fail(case.failure, pytrace=False)
            if case.skipped:
                pytest.skip(case.skipped)


def _outcomes(path: Path, interpret: bool) -> list[Outcome]:
    environment = environment_of_cases()
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as place:
        report = Path(place, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, str(path)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        # 0 and 1: all cases ran, and some failed; all else is no result at all
        assert done.returncode in (0, 1), done.stdout[-6000:] + done.stderr[-2000:]
        return [_outcome(case) for case in ElementTree.parse(report).iter("testcase")]


def _outcome(case: ElementTree.Element) -> Outcome:
    said = {kind: case.find(kind) for kind in ("failure", "error", "skipped")}
    failed = said["failure"] if said["failure"] is not None else said["error"]
    failure = "" if failed is None else failed.text or failed.get("message", "failed")
    skipped = "" if said["skipped"] is None else said["skipped"].get("message", "skipped")
    return Outcome(case.get("name", ""), failure, skipped)


def environment_of_cases() -> dict[str, str]:
    """This process's environment, without the interpreter, and with this repository before other paths."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    return environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


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
        if made.is_floating_point():
            return made.fill_(float("nan"))
        return made.fill_(True if made.dtype == torch.bool else torch.iinfo(made.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)
