"""The kernels of shared_prefix_decode compile for chips that are not here: no spills, limits of registers and
shared memory, matrix instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

# Case -> most registers a thread on NVIDIA chips and on gfx942, most KiB of shared memory a program.
# Compilers differ by a few registers.
TABLE = {
    "prompt, 7 x 8": (208, 256, 113),
    "prompt, 4 x 8": (184, 256, 76),
    "prompt, 8 x 16": (254, 208, 97),
    "prompt, 2 x 8, D 64": (112, 128, 36),
    "prompt, 7 x 8, D 80": (208, 256, 113),
    "prompt, 8 x 8, D 256": (200, 272, 129),
    "prompt, float32, D 256": (128, 224, 48),
    "merge, 7": (120, 144, 21),
    "merge, D 256": (184, 224, 41),
    "merge, float32, D 256": (96, 224, 48),
}
WIDE = (
    "prompt, 7 x 8",
    "prompt, 8 x 16",
    "prompt, 7 x 8, D 80",
    "prompt, 8 x 8, D 256",
)  # 64 queries or more: Hopper's own instruction


def test_every_kernel_compiles_within_its_limits() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_decode"],
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
        assert targets.keys() == SHARED_MEMORY.keys()
        for target, counts in targets.items():
            assert counts["spills"] == 0, (name, target, counts)
            assert counts["registers"] <= (amd if target == "gfx942" else nvidia), (name, target, counts)
            assert counts["shared"] <= min(shared * 1024 + 1024, SHARED_MEMORY[target]), (
                name,
                target,
                counts,
            )
        if "float32" not in name:
            assert targets["sm_80"]["mma"] > 0, name
            assert targets["sm_90"]["wgmma" if name in WIDE else "mma"] > 0, name
