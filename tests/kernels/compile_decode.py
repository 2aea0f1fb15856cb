"""Compile the kernels of shared_prefix_decode at their real tile sizes; prints a JSON table. Run by
test_compile_decode.py."""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
from locus_kernels.shared_prefix_decode import triton as decode

from tests.kernels.compile_ahead import TARGETS, figures

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def prompt(target: str, dtype: torch.dtype, dimension: int, share: int, rows: int) -> dict[str, int]:
    """prompt_kernel for `rows` replies a group and `share` query heads a key head."""
    floats, integers = (
        dict.fromkeys(("q", "prompt_k", "prompt_v"), TYPES[dtype]),
        dict.fromkeys(("cu_prompts", "cu_rows"), "*i32"),
    )
    numbers = dict.fromkeys(("R", "H", "tiles"), "i32")
    strides = dict.fromkeys(("q_row", "q_head", "k_token", "k_head", "v_token", "v_head"), "i32")
    tiles = decode.prompt_tiles(dtype, dimension, rows * share, amd=target == "gfx942")
    constants = {
        "SHARE": share,
        "D": dimension,
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "DEPTH": triton.next_power_of_2(dimension),
        "UPCAST": False,
    }
    arguments = {
        **floats,
        **integers,
        "partial": "*fp32",
        "lse": "*fp32",
        **numbers,
        **strides,
        "scale": "fp32",
        **constants,
    }
    return figures(
        decode.prompt_kernel,
        arguments,
        target,
        tuple(strides),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def merge(target: str, dtype: torch.dtype, dimension: int, share: int, rows: int) -> dict[str, int]:
    """merge_kernel; `rows` does not matter to it."""
    floats, integers = (
        dict.fromkeys(("q", "own_k", "own_v"), TYPES[dtype]),
        dict.fromkeys(("own_lengths", "cu_rows"), "*i32"),
    )
    numbers = dict.fromkeys(("R", "H", "groups", "tiles", "splits", "longest_own"), "i32")
    strides = dict.fromkeys(
        ("q_row", "q_head", "k_row", "k_head", "k_token", "v_row", "v_head", "v_token"), "i32"
    )
    tiles = decode.own_tiles(dtype)
    constants = {
        "SHARE": share,
        "D": dimension,
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "DEPTH": triton.next_power_of_2(dimension),
        "UPCAST": False,
    }
    results: dict[str, Any] = {"partial": "*fp32", "lse": "*fp32", "out": TYPES[dtype]}
    arguments = {**floats, **integers, **results, **numbers, **strides, "scale": "fp32", **constants}
    return figures(
        decode.merge_kernel, arguments, target, tuple(strides), num_warps=tiles.warps, num_stages=tiles.stages
    )


# name -> kernel, dtype, head dimension, query heads a key head, rows a group
CASES = {
    "prompt, 7 x 8": (prompt, torch.bfloat16, 128, 7, 8),
    "prompt, 4 x 8": (prompt, torch.bfloat16, 128, 4, 8),
    "prompt, 8 x 16": (prompt, torch.bfloat16, 128, 8, 16),
    "prompt, 2 x 8, D 64": (prompt, torch.float16, 64, 2, 8),
    "prompt, 7 x 8, D 80": (prompt, torch.bfloat16, 80, 7, 8),
    "prompt, 8 x 8, D 256": (prompt, torch.bfloat16, 256, 8, 8),
    "prompt, float32, D 256": (prompt, torch.float32, 256, 4, 8),
    "merge, 7": (merge, torch.bfloat16, 128, 7, 8),
    "merge, D 256": (merge, torch.float16, 256, 8, 8),
    "merge, float32, D 256": (merge, torch.float32, 256, 4, 8),
}

if __name__ == "__main__":
    print(
        json.dumps(
            {
                name: {target: kernel(target, *shape) for target in TARGETS}
                for name, (kernel, *shape) in CASES.items()
            }
        )
    )
