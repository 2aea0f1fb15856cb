"""The kernels of box_reward compile for chips that are not here: no spills, and registers and
shared memory within a table that holds for every supported version of Triton."""

from __future__ import annotations

import pytest

from tests.kernels.compiled import SHARED_MEMORY, assert_everywhere, compiled

pytestmark = pytest.mark.long

# Kernel -> most registers a thread on NVIDIA chips and on gfx942, most bytes of shared memory a program.
# Compilers differ by a few registers.
LIMITS = {
    "box_reward, groups of 8": (110, 128, 64),
    "box_reward, groups of 512": (128, 128, 128),
    "read_boxes, int32 ids": (110, 128, 64),
}


def test_every_kernel_has_limits() -> None:
    pytest.importorskip("triton")
    found = compiled("box_reward")
    assert found.keys() == LIMITS.keys()
    assert {target for targets in found.values() for target in targets} == SHARED_MEMORY.keys()


@pytest.mark.parametrize("name", LIMITS)
def test_compiles_within_its_limits(name: str) -> None:
    pytest.importorskip("triton")
    assert_everywhere(compiled("box_reward")[name], LIMITS[name])
