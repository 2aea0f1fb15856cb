"""The kernels of linear_logprob at their real tile sizes, for test_compile.py."""

from __future__ import annotations

from typing import Any

import torch
from locus_kernels.linear_logprob.triton_backward import logit_gradient_kernel
from locus_kernels.linear_logprob.triton_forward import (
    FINAL_ROWS,
    FINAL_TILES,
    finish_kernel,
    partial_kernel,
)
from locus_kernels.linear_logprob.triton_head import Tiles, choose_tiles

from tests.kernels.compile_ahead import TARGETS, Cases, Variant, on, report

CHIPS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": None}
BULK = ("sm_90", "sm_100")  # have the bulk copy engine, which reads by descriptors
FLOATS = {"*bf16": torch.bfloat16, "*fp32": torch.float32}


def matrix(pointer: str, descriptors: bool, rows: int, columns: int) -> str:
    return f"tensordesc<{pointer[1:]}[{rows},{columns}]>" if descriptors else pointer


def shared(tiles: Tiles, capped: bool, aligned: bool, descriptors: bool) -> dict[str, Any]:
    """What both matrix kernels take last."""
    numbers = dict.fromkeys(("inverse_temperature", "softcap", "inverse_softcap"), "fp32")
    sizes = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth}
    flags = {"EVEN": aligned, "DESCRIPTORS": descriptors, "UPCAST": False}
    return {**numbers, "CAPPED": capped, **sizes, **flags}


def forward(
    target: str, descriptors: bool, capped: bool, pointer: str = "*bf16", aligned: bool = True
) -> Variant:
    """partial_kernel as its launcher starts it for this chip."""
    tiles = choose_tiles(FLOATS[pointer], CHIPS[target], descriptors and not capped, aligned)
    numbers = dict.fromkeys(("T", "V", "D", "hidden_stride", "weight_stride"), "i32")
    arguments = {
        "hidden": matrix(pointer, descriptors, tiles.rows, tiles.depth),
        "weight": matrix(pointer, descriptors, tiles.columns, tiles.depth),
        "ids": "*i64", **dict.fromkeys(("maximum", "total", "weighted", "target"), "*fp32"),
        **numbers, **shared(tiles, capped, aligned, descriptors),
    }  # fmt: skip
    divisible = ("D", "hidden_stride", "weight_stride") if aligned else ()
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return Variant(partial_kernel, arguments, options, divisible)


def backward(
    target: str, descriptors: bool, capped: bool, entropy: bool, pointer: str = "*bf16", aligned: bool = True
) -> Variant:
    """logit_gradient_kernel as its launcher starts it for this chip."""
    wide = descriptors and not capped and not entropy
    tiles = choose_tiles(FLOATS[pointer], CHIPS[target], wide, aligned)
    vectors = dict.fromkeys(("entropy", "grad_logprob", "grad_entropy"), "*fp32")
    sizes = ("T", "first", "stop", "D", "hidden_stride", "weight_stride", "out_stride")
    arguments = {
        "hidden": matrix(pointer, descriptors, tiles.rows, tiles.depth),
        "weight": matrix(pointer, descriptors, tiles.columns, tiles.depth),
        "ids": "*i64", "lse": "*fp64", **vectors,
        "out": matrix(pointer, descriptors, tiles.rows, tiles.columns), **dict.fromkeys(sizes, "i32"),
        "WITH_ENTROPY": entropy, "EXACT": pointer == "*fp32", **shared(tiles, capped, aligned, descriptors),
    }  # fmt: skip
    divisible = ("D", "hidden_stride", "weight_stride") if aligned else ()
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return Variant(logit_gradient_kernel, arguments, options, (*divisible, "out_stride"))


def finish() -> Variant:
    pointers = dict.fromkeys(("maximum", "total", "weighted", "target", "logprob", "entropy"), "*fp32")
    sizes = {"T": "i32", "N": "i32", "ROWS": FINAL_ROWS, "TILES": FINAL_TILES}
    return Variant(finish_kernel, {**pointers, "lse": "*fp64", **sizes}, {})


def matrix_cases() -> Cases:
    """Both matrix kernels by every way that a chip has of reading, with and without soft-cap and entropy."""
    cases: Cases = {}
    for way in ("pointers", "descriptors"):
        targets = [target for target in TARGETS if way == "pointers" or target in BULK]
        bulk = way == "descriptors"
        for choice, capped in (("plain", False), ("capped", True)):
            cases[f"forward {way} {choice}"] = {t: forward(t, bulk, capped) for t in targets}
        for choice, capped, entropy in (
            ("plain", False, False),
            ("entropy", False, True),
            ("capped, entropy", True, True),
        ):
            cases[f"backward {way} {choice}"] = {t: backward(t, bulk, capped, entropy) for t in targets}
    return cases


CASES: Cases = {
    "finish": on(finish()),
    "forward float32": {t: forward(t, False, True, "*fp32") for t in TARGETS},
    "backward float32": {t: backward(t, False, True, True, "*fp32") for t in TARGETS},
    "forward unaligned": {t: forward(t, False, True, aligned=False) for t in TARGETS},
    "backward unaligned": {t: backward(t, False, True, True, aligned=False) for t in TARGETS},
    **matrix_cases(),
}

if __name__ == "__main__":
    report(CASES)
