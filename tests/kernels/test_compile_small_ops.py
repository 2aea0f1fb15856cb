"""The kernels of box_reward, sample, patchify and adamw8bit compile for chips that are not here: no spills,
and registers and shared memory within a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

# Kernel -> most registers a thread on NVIDIA chips and on gfx942, most bytes of shared memory a program.
# Compilers differ by a few registers.
TABLE = {
    "box_reward, groups of 8": (110, 128, 64),
    "box_reward, groups of 512": (128, 128, 128),
    "read_boxes, int32 ids": (110, 128, 64),
    "sample tiles": (48, 48, 64),
    "sample tiles, mask and cut, float32": (72, 64, 64),
    "sample tiles, greedy": (104, 64, 64),
    "sample draw": (128, 128, 2048),
    "sample draw, mask and cut": (128, 128, 2048),
    "sample draw, greedy": (40, 64, 64),
    "sample threshold": (96, 128, 8192),
    "adamw8bit, bfloat16": (128, 96, 8192),
    "adamw8bit, float32": (168, 96, 8192),
    "adamw8bit, float32 moments": (80, 64, 8192),
    "patchify first": (56, 48, 64),
    "patchify second": (128, 96, 64),
}


def test_every_kernel_compiles_within_its_limits() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_small_ops"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found.keys() == TABLE.keys()
    for name, targets in found.items():
        nvidia, amd, shared = TABLE[name]
        for target, counts in targets.items():
            assert counts["spills"] == 0, (name, target, counts)
            assert counts["registers"] <= (amd if target == "gfx942" else nvidia), (name, target, counts)
            assert counts["shared"] <= min(shared, SHARED_MEMORY[target]), (name, target, counts)
    assert {target for targets in found.values() for target in targets} == SHARED_MEMORY.keys()
