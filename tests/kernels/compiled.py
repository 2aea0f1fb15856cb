"""Run an operator's compile.py and hold what its kernels need of a chip to limits."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache

from tests.kernels.interpreter import ROOT, environment_of_cases

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
Counts = dict[str, int]


@lru_cache
def compiled(operator: str) -> dict[str, dict[str, Counts]]:
    """Kernel -> target -> what `compile_ahead.figures` counts, for an operator's compile.py."""
    command = [sys.executable, "-m", f"tests.kernels.{operator}.compile"]
    done = subprocess.run(command, env=environment_of_cases(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def assert_within(target: str, counts: Counts, registers: int, shared: int) -> None:
    """No spills; at most so many registers a thread and so many bytes of shared memory a program."""
    assert counts["spills"] == 0, (target, counts)
    assert counts["registers"] <= registers, (target, counts)
    assert counts["shared"] <= min(shared, SHARED_MEMORY[target]), (target, counts)


def assert_everywhere(found: dict[str, Counts], limits: tuple[int, int, int]) -> None:
    """limits: registers on NVIDIA chips and on gfx942, bytes of shared memory."""
    nvidia, amd, shared = limits
    for target, counts in found.items():
        assert_within(target, counts, amd if target == "gfx942" else nvidia, shared)
