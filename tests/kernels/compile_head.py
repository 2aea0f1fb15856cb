"""Compile the kernels of linear_logprob and grpo_loss at their real tile sizes; prints a JSON table. Run by
test_compile_head.py."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from locus_kernels.grpo_loss import triton as grpo
from locus_kernels.linear_logprob import triton as head

from tests.kernels.compile_ahead import TARGETS, figures

CHIPS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": None}
CHOICES = {
    "plain": (False, False),
    "entropy": (False, True),
    "capped": (True, False),
    "capped, entropy": (True, True),
}  # (soft-cap, entropy)
FLOATS = {"*bf16": torch.bfloat16, "*fp32": torch.float32}


def matrix_kernel(
    target: str,
    backward: bool,
    descriptors: bool,
    capped: bool,
    entropy: bool,
    pointer: str = "*bf16",
    aligned: bool = True,
) -> dict[str, int]:
    """One of the two matrix kernels as its launcher starts it for this chip, dtype and choice."""
    tiles = head.choose_tiles(
        FLOATS[pointer], CHIPS[target], descriptors and not capped and not entropy, aligned
    )

    def matrix(rows: int, columns: int) -> str:
        return f"tensordesc<{pointer[1:]}[{rows},{columns}]>" if descriptors else pointer

    arguments: dict[str, Any] = {
        "hidden": matrix(tiles.rows, tiles.depth),
        "weight": matrix(tiles.columns, tiles.depth),
        "ids": "*i64",
    }
    names = (
        ("lse", "entropy", "grad_logprob", "grad_entropy")
        if backward
        else ("maximum", "total", "weighted", "target")
    )
    arguments |= dict.fromkeys(names, "*fp32") | (
        {"lse": "*fp64", "out": matrix(tiles.rows, tiles.columns)} if backward else {}
    )
    sizes = ("T", "first", "stop", "D") if backward else ("T", "V", "D")
    arguments |= dict.fromkeys(
        (*sizes, "hidden_stride", "weight_stride", *(["out_stride"] if backward else [])), "i32"
    )
    arguments |= dict.fromkeys(("inverse_temperature", "softcap", "inverse_softcap"), "fp32") | {
        "CAPPED": capped
    }
    arguments |= {"WITH_ENTROPY": entropy, "EXACT": pointer == "*fp32"} if backward else {}
    arguments |= {
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": tiles.depth,
        "EVEN": aligned,
        "DESCRIPTORS": descriptors,
        "UPCAST": False,
    }
    kernel = head.logit_gradient_kernel if backward else head.partial_kernel
    divisible = ("D", "hidden_stride", "weight_stride") if aligned else ()
    return figures(
        kernel, arguments, target, (*divisible, "out_stride"), num_warps=tiles.warps, num_stages=tiles.stages
    )


def small_kernels(target: str) -> dict[str, dict[str, int]]:
    partials = dict.fromkeys(("maximum", "total", "weighted", "target"), "*fp32")
    block = {"ROWS": head.FINAL_ROWS, "TILES": head.FINAL_TILES}
    finish = (
        partials
        | dict.fromkeys(("logprob", "entropy", "lse"), "*fp32")
        | {"lse": "*fp64", "T": "i32", "N": "i32"}
        | block
    )
    vectors = ("advantages", "old", "reference", "token_weight", "logprob", "lse", "entropy", "slope", "sums")
    objective = partials | dict.fromkeys(vectors, "*fp32") | dict.fromkeys(("T", "N", "P"), "i32")
    objective |= {"lse": "*fp64"} | dict.fromkeys(
        ("lowest", "highest", "kl_coefficient", "log_ratio_clamp", "kl_clamp"), "fp32"
    )
    objective |= dict.fromkeys(("HAS_OLD", "HAS_REFERENCE", "HAS_WEIGHT"), True) | block
    sums = {"sums": "*fp32", "out": "*fp32", "P": "i32", "BLOCK": grpo.SUM_BLOCK}
    kernels = {
        "finish": (head.finish_kernel, finish),
        "objective": (grpo.objective_kernel, objective),
        "sum": (grpo.sum_kernel, sums),
    }
    return {name: figures(kernel, arguments, target) for name, (kernel, arguments) in kernels.items()}


if __name__ == "__main__":
    table = {}
    for target in sys.argv[1:] or TARGETS:
        bulk = target in ("sm_90", "sm_100")
        rows = small_kernels(target)
        rows["forward float32"] = matrix_kernel(target, False, False, True, False, "*fp32")
        rows["backward float32"] = matrix_kernel(target, True, False, True, True, "*fp32")
        rows["forward unaligned"] = matrix_kernel(target, False, False, True, False, aligned=False)
        rows["backward unaligned"] = matrix_kernel(target, True, False, True, True, aligned=False)
        for way in ("pointers", "descriptors")[: 1 + bulk]:
            for choice, (capped, entropy) in CHOICES.items():
                if not entropy:
                    rows[f"forward {way} {choice}"] = matrix_kernel(
                        target, False, way == "descriptors", capped, False
                    )
                if choice != "capped":
                    rows[f"backward {way} {choice}"] = matrix_kernel(
                        target, True, way == "descriptors", capped, entropy
                    )
        table[target] = rows
    print(json.dumps(table))
