"""The kernels of sample at their real tile sizes, for test_compile.py."""

from __future__ import annotations

from typing import Any

from locus_kernels.sample import triton as sampling
from locus_kernels.sample.triton_threshold import SEARCH_TILE, threshold_kernel

from tests.kernels.compile_ahead import Cases, Variant, on, report

STRIDES: dict[str, Any] = {"stride_r": "i32", "stride_v": 1}  # contiguous logits
PARTIAL = {"partial": "*fp32", "best": "*i32"}
OPTIONS = {"num_warps": 8}


def pointers(logits: str = "*bf16") -> dict[str, Any]:
    return {"logits": logits, "allowed": "*u8", "threshold": "*i64"}


def flags(masked: bool, greedy: bool, cut: bool) -> dict[str, Any]:
    return {"GREEDY": greedy, "MASKED": masked, "CUT": cut, "BLOCK": sampling.TILE}


def threshold(masked: bool) -> Variant:
    numbers = {"vocab": "i32", **STRIDES, "inverse_temperature": "fp32", "top_k": "i32", "top_p": "fp32"}
    constants = {"K": True, "P": True, "MASKED": masked, "BLOCK": SEARCH_TILE}
    return Variant(threshold_kernel, {**pointers(), **numbers, **constants}, OPTIONS)


def tiles(masked: bool, greedy: bool = False, cut: bool = False, logits: str = "*bf16") -> Variant:
    numbers = {"vocab": "i32", "tiles": "i32", **STRIDES, "inverse_temperature": "fp32"}
    arguments = {**pointers(logits), **PARTIAL, **numbers, **flags(masked, greedy, cut)}
    return Variant(sampling.tiles_kernel, arguments, OPTIONS)


def draw(masked: bool, greedy: bool = False, cut: bool = False) -> Variant:
    """For 151,936 ids."""
    drawn = {"rows": "*i64", "positions": "*i64", "ids": "*i64", "logprob": "*fp32"}
    strides = {**STRIDES, "stride_row": 1, "stride_position": 1}
    numbers = {"vocab": "i32", "tiles": "i32", **strides, "inverse_temperature": "fp32"}
    place = {"start": "i64", "position": "i32", "MOVING": False, "TILES": 64}
    arguments = {**pointers(), **PARTIAL, **drawn, **numbers, **flags(masked, greedy, cut), **place}
    return Variant(sampling.draw_kernel, arguments, OPTIONS)


CASES: Cases = {
    "sample tiles": on(tiles(False)),
    "sample tiles, mask and cut, float32": on(tiles(True, cut=True, logits="*fp32")),
    "sample tiles, greedy": on(tiles(True, greedy=True), "sm_90"),
    "sample draw": on(draw(False), "sm_90"),
    "sample draw, mask and cut": on(draw(True, cut=True)),
    "sample draw, greedy": on(draw(True, greedy=True), "sm_90"),
    "sample threshold": on(threshold(True)),
}

if __name__ == "__main__":
    report(CASES)
