"""The head's kernels compiled for chips that are not here: registers, spills, shared memory and wgmma of
every one, held by this table."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.interpreter import ROOT

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# (registers a thread, shared memory a program in bytes) at most, measured with Triton 3.7.1: the matrix
# kernels on bfloat16 as they run on each chip.
CEILING = {
    "sm_80": {
        "forward pointers plain": (160, 98304),
        "backward pointers plain": (174, 98304),
        "forward pointers capped": (160, 98304),
        "backward pointers entropy": (236, 98304),
        "backward pointers capped, entropy": (235, 98304),
    },
    "sm_90": {
        "forward descriptors plain": (184, 196640),
        "backward descriptors plain": (255, 196640),
        "forward descriptors capped": (188, 131104),
        "backward descriptors entropy": (192, 131104),
        "backward descriptors capped, entropy": (178, 131104),
    },
    "sm_100": {
        "forward descriptors plain": (176, 196656),
        "backward descriptors plain": (242, 196656),
        "forward descriptors capped": (184, 131120),
        "backward descriptors entropy": (208, 131120),
        "backward descriptors capped, entropy": (188, 131120),
    },
    "gfx942": {
        "forward pointers plain": (108, 32768),
        "backward pointers plain": (124, 32768),
        "forward pointers capped": (144, 32768),
        "backward pointers entropy": (130, 32768),
        "backward pointers capped, entropy": (144, 32768),
    },
}


@pytest.mark.parametrize("target", CEILING)
def test_compiles_ahead(target) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, str(ROOT / "tests" / "kernels" / "compile_head.py"), target]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)[target]
    for name, row in rows.items():
        assert row["spills"] == 0, (name, row)
        assert row["shared"] < SHARED_LIMIT[target], (name, row)
        matrix = name not in ("finish", "objective", "sum") and not name.endswith("float32")
        assert (row["wgmma"] > 0) == (matrix and target == "sm_90"), (name, row)
    for name, (registers, shared) in CEILING[target].items():
        assert rows[name]["registers"] <= registers, (name, rows[name])
        assert rows[name]["shared"] <= shared, (name, rows[name])
