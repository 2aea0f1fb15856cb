"""The kernels of shared_prefix_decode compile for chips that are not here: no spills, limits of registers and
shared memory, matrix instructions."""

from __future__ import annotations

import pytest

from tests.kernels.compiled import SHARED_MEMORY, assert_everywhere, compiled

pytestmark = pytest.mark.long

# Case -> most registers a thread on NVIDIA chips and on gfx942, most KiB of shared memory a program.
# Compilers differ by a few registers.
LIMITS = {
    "prompt, 7 x 8": (208, 256, 113),
    "prompt, 4 x 8": (184, 280, 76),
    "prompt, 8 x 16": (254, 208, 97),
    "prompt, 2 x 8, D 64": (112, 136, 36),
    "prompt, 7 x 8, D 80": (208, 256, 113),
    "prompt, 8 x 8, D 256": (200, 272, 129),
    "prompt, float32, D 256": (128, 224, 48),
    "merge, 7": (120, 144, 21),
    "merge, D 256": (184, 224, 41),
    "merge, float32, D 256": (96, 224, 48),
}
# 64 queries or more: Hopper's own instruction
WIDE = (
    "prompt, 7 x 8",
    "prompt, 8 x 16",
    "prompt, 7 x 8, D 80",
    "prompt, 8 x 8, D 256",
)


def test_every_kernel_has_limits() -> None:
    pytest.importorskip("triton")
    found = compiled("shared_prefix_decode")
    assert found.keys() == LIMITS.keys()
    assert all(targets.keys() == SHARED_MEMORY.keys() for targets in found.values())


@pytest.mark.parametrize("name", LIMITS)
def test_compiles_within_its_limits(name: str) -> None:
    pytest.importorskip("triton")
    targets = compiled("shared_prefix_decode")[name]
    nvidia, amd, kibibytes = LIMITS[name]
    assert_everywhere(targets, (nvidia, amd, kibibytes * 1024 + 1024))
    if "float32" not in name:
        assert targets["sm_80"]["mma"] > 0
        assert targets["sm_90"]["wgmma" if name in WIDE else "mma"] > 0
