"""The kernels of shared_prefix_decode at their real tile sizes, for test_compile.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from locus_kernels.shared_prefix_decode import triton as decode
from locus_kernels.shared_prefix_decode.triton import Tiles

from tests.kernels.compile_ahead import TARGETS, Cases, Variant, report

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def constants(tiles: Tiles, dimension: int, share: int) -> dict[str, Any]:
    depth = triton.next_power_of_2(dimension)
    sizes = {"ROWS": tiles.rows, "KEYS": tiles.keys, "DEPTH": depth}
    return {"SHARE": share, "D": dimension, **sizes, "UPCAST": False}


def prompt(dtype: torch.dtype, dimension: int, share: int, rows: int) -> dict[str, Variant]:
    """prompt_kernel for `rows` replies a group and `share` query heads a key head."""
    variants = {}
    for target in TARGETS:
        tiles = decode.prompt_tiles(dtype, dimension, rows * share, amd=target == "gfx942")
        floats = dict.fromkeys(("q", "prompt_k", "prompt_v"), TYPES[dtype])
        results = dict.fromkeys(("partial", "lse"), "*fp32")
        strides = dict.fromkeys(("q_row", "q_head", "k_token", "k_head", "v_token", "v_head"), "i32")
        arguments = {
            **floats, **dict.fromkeys(("cu_prompts", "cu_rows"), "*i32"), **results,
            **dict.fromkeys(("R", "H", "tiles"), "i32"), **strides, "scale": "fp32",
            **constants(tiles, dimension, share),
        }  # fmt: skip
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        variants[target] = Variant(decode.prompt_kernel, arguments, options, tuple(strides))
    return variants


def merge(dtype: torch.dtype, dimension: int, share: int) -> dict[str, Variant]:
    """merge_kernel for `share` query heads a key head."""
    tiles = decode.own_tiles(dtype)
    floats = dict.fromkeys(("q", "own_k", "own_v"), TYPES[dtype])
    results = {"partial": "*fp32", "lse": "*fp32", "out": TYPES[dtype]}
    numbers = dict.fromkeys(("R", "H", "groups", "tiles", "splits", "longest_own"), "i32")
    strides = dict.fromkeys(
        ("q_row", "q_head", "k_row", "k_head", "k_token", "v_row", "v_head", "v_token"), "i32"
    )
    arguments = {
        **floats, **dict.fromkeys(("own_lengths", "cu_rows"), "*i32"), **results, **numbers, **strides,
        "scale": "fp32", **constants(tiles, dimension, share),
    }  # fmt: skip
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return dict.fromkeys(TARGETS, Variant(decode.merge_kernel, arguments, options, tuple(strides)))


CASES: Cases = {
    "prompt, 7 x 8": prompt(BRAIN, 128, 7, 8),
    "prompt, 4 x 8": prompt(BRAIN, 128, 4, 8),
    "prompt, 8 x 16": prompt(BRAIN, 128, 8, 16),
    "prompt, 2 x 8, D 64": prompt(HALF, 64, 2, 8),
    "prompt, 7 x 8, D 80": prompt(BRAIN, 80, 7, 8),
    "prompt, 8 x 8, D 256": prompt(BRAIN, 256, 8, 8),
    "prompt, float32, D 256": prompt(FULL, 256, 4, 8),
    "merge, 7": merge(BRAIN, 128, 7),
    "merge, D 256": merge(HALF, 256, 8),
    "merge, float32, D 256": merge(FULL, 256, 4),
}

if __name__ == "__main__":
    report(CASES)
