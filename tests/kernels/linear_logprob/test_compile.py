"""The head's kernels compiled for chips that are not here: registers, spills, shared memory and wgmma of
every one, held by this table."""

from __future__ import annotations

import pytest

from tests.kernels.compiled import SHARED_MEMORY, assert_within, compiled

pytestmark = pytest.mark.long

# (registers a thread, shared memory a program in bytes) at most, the larger of Triton 3.6.0's and
# 3.7.1's: the matrix kernels on bfloat16 as they run on each chip.
CEILING = {
    "sm_80": {
        "forward pointers plain": (160, 98304),
        "backward pointers plain": (174, 98304),
        "forward pointers capped": (160, 98304),
        "backward pointers entropy": (248, 98304),
        "backward pointers capped, entropy": (235, 98304),
    },
    "sm_90": {
        "forward descriptors plain": (184, 196640),
        "backward descriptors plain": (255, 196640),
        "forward descriptors capped": (188, 131104),
        "backward descriptors entropy": (236, 131104),
        "backward descriptors capped, entropy": (182, 131104),
    },
    "sm_100": {
        "forward descriptors plain": (176, 196656),
        "backward descriptors plain": (255, 196656),
        "forward descriptors capped": (184, 131120),
        "backward descriptors entropy": (208, 131120),
        "backward descriptors capped, entropy": (188, 131120),
    },
    "gfx942": {
        "forward pointers plain": (108, 32768),
        "backward pointers plain": (124, 32768),
        "forward pointers capped": (145, 32768),
        "backward pointers entropy": (130, 32768),
        "backward pointers capped, entropy": (144, 32768),
    },
}


@pytest.mark.parametrize("target", CEILING)
def test_compiles_ahead(target: str) -> None:
    pytest.importorskip("triton")
    rows = {name: each[target] for name, each in compiled("linear_logprob").items() if target in each}
    assert CEILING[target].keys() <= rows.keys()
    for name, row in rows.items():
        assert row["spills"] == 0, (name, row)
        assert row["shared"] < SHARED_MEMORY[target], (name, row)
        matrix = name != "finish" and not name.endswith("float32")
        assert (row["wgmma"] > 0) == (matrix and target == "sm_90"), (name, row)
    for name, (registers, shared) in CEILING[target].items():
        assert_within(target, rows[name], registers, shared)
