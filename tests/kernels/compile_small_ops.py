"""Compile the kernels of box_reward, sample, patchify and adamw8bit at their real tile sizes; prints a JSON
table.

Run by test_compile_small_ops.py.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton.language as tl
from locus_kernels.adamw8bit import triton as adamw
from locus_kernels.box_reward import triton as box
from locus_kernels.patchify import triton as patches
from locus_kernels.sample import triton as sampling

from tests.kernels.compile_ahead import TARGETS, figures

Case = tuple[Any, dict[str, Any], dict[str, Any]]  # kernel, arguments as in `figures`, compile options


def box_reward(group: int, groups: int, reward: bool, id_type: str = "*i64") -> Case:
    """box_reward_kernel for groups of `group` replies, `groups` of them a program."""
    pointers = {
        "ids": id_type,
        "lengths": "*i64",
        "offsets": "*i32",
        "classes": "*u8",
        "transitions": "*i16",
        "final": "*u8",
        "target": "*fp32",
    }
    out = {
        "box": "*fp32",
        "valid": "*u8",
        "format_ok": "*u8",
        "iou": "*fp32",
        "reward": "*fp32",
        "advantage": "*fp32",
        "zero_variance": "*u8",
    }
    integers = dict.fromkeys(
        ("rows", "tokens", "vocab_size", "group_size", "stride_r", "stride_l", "stride_length"), "i32"
    )
    weights = dict.fromkeys(("shape_weight", "format_weight", "rising"), "fp32")
    constants = {"SHAPE": box.shape_giou, "READ": 2, "FORMAT": 2, "REWARD": reward, "NORMALIZE": True}
    tile = {"GROUPS": groups, "BLOCK": group, "UNROLL": 8}
    options = {"num_warps": max(1, min(16, groups * group // 32)), "enable_fp_fusion": False}
    return box.box_reward_kernel, {**pointers, **out, **integers, **weights, **constants, **tile}, options


def sample(stage: str, masked: bool, greedy: bool = False, cut: bool = False, logits: str = "*bf16") -> Case:
    """One of the sampling kernels on contiguous logits, at the tile sizes of the launcher; draw_kernel for
    151,936 ids."""
    pointers = {"logits": logits, "allowed": "*u8", "threshold": "*i64"}
    partial = {"partial": "*fp32", "best": "*i32"}
    drawn = {"rows": "*i64", "positions": "*i64", "ids": "*i64", "logprob": "*fp32"}
    flags = {"GREEDY": greedy, "MASKED": masked, "CUT": cut, "BLOCK": sampling.TILE}
    strides = {"stride_r": "i32", "stride_v": 1}
    warps = {"num_warps": 8}
    if stage == "threshold":
        numbers = {"vocab": "i32", **strides, "inverse_temperature": "fp32", "top_k": "i32", "top_p": "fp32"}
        return (
            sampling.threshold_kernel,
            {**pointers, **numbers, "K": True, "P": True, "MASKED": masked, "BLOCK": sampling.SEARCH_TILE},
            warps,
        )
    if stage == "tiles":
        numbers = {"vocab": "i32", "tiles": "i32", **strides, "inverse_temperature": "fp32"}
        return sampling.tiles_kernel, {**pointers, **partial, **numbers, **flags}, warps
    numbers = {
        "vocab": "i32",
        "tiles": "i32",
        **strides,
        "stride_row": 1,
        "stride_position": 1,
        "inverse_temperature": "fp32",
    }
    counted = {"start": "i64", "position": "i32", **flags, "MOVING": False, "TILES": 64}
    return sampling.draw_kernel, {**pointers, **partial, **drawn, **numbers, **counted}, warps


def patchify(stage: str, side: int = 14) -> Case:
    """One of the patchify kernels at the tile sizes of the launcher."""
    pointers = {"jobs": "*i64", "job_of_program": "*i64", "taps": "*i32", "middle": "*u8"}
    if stage == "first":
        return patches.first_kernel, {**pointers, "ROWS": patches.ROWS, "COLUMNS": patches.COLUMNS}, {}
    scales = dict.fromkeys(("scale_r", "scale_g", "scale_b", "shift_r", "shift_g", "shift_b"), "fp32")
    sides = {"SIDE": side, "FRAMES": 2, "MERGE": 2, "VALUES": patches.VALUES}
    return patches.second_kernel, {**pointers, "out": "*fp32", **scales, **sides}, {"enable_fp_fusion": False}


def adamw8bit(value: tl.dtype, slope: tl.dtype, eight_bit: bool = True) -> Case:
    """adamw8bit_kernel for weights and gradients of these types."""
    numbers = dict.fromkeys(("beta1", "beta2", "eps", "weight_decay"), "fp32")
    arguments = {
        "jobs": "*i64",
        "corrections": "*fp32",
        "gradient_scale": "*fp32",
        "jobs_count": "i32",
        **numbers,
    }
    constants = {"VALUES": value, "SLOPES": slope, "EIGHT_BIT": eight_bit, "ALIGNED": True, "SEARCH": 10}
    return adamw.adamw8bit_kernel, {**arguments, **constants, "ROWS": adamw.ROWS}, {"num_warps": 4}


EVERYWHERE = tuple(TARGETS)
CASES: dict[str, tuple[Case, tuple[str, ...]]] = {
    "box_reward, groups of 8": (box_reward(8, 4, True), EVERYWHERE),
    "box_reward, groups of 512": (box_reward(512, 1, True), ("sm_80",)),
    "read_boxes, int32 ids": (box_reward(1, 32, False, "*i32"), ("sm_90",)),
    "sample tiles": (sample("tiles", False), EVERYWHERE),
    "sample tiles, mask and cut, float32": (sample("tiles", True, cut=True, logits="*fp32"), EVERYWHERE),
    "sample tiles, greedy": (sample("tiles", True, greedy=True), ("sm_90",)),
    "sample draw": (sample("draw", False), ("sm_90",)),
    "sample draw, mask and cut": (sample("draw", True, cut=True), EVERYWHERE),
    "sample draw, greedy": (sample("draw", True, greedy=True), ("sm_90",)),
    "sample threshold": (sample("threshold", True), EVERYWHERE),
    "adamw8bit, bfloat16": (adamw8bit(tl.bfloat16, tl.bfloat16), EVERYWHERE),
    "adamw8bit, float32": (adamw8bit(tl.float32, tl.float32), EVERYWHERE),
    "adamw8bit, float32 moments": (adamw8bit(tl.bfloat16, tl.bfloat16, eight_bit=False), EVERYWHERE),
    "patchify first": (patchify("first"), EVERYWHERE),
    "patchify second": (patchify("second"), EVERYWHERE),
}

if __name__ == "__main__":
    table = {}
    for name, ((kernel, arguments, options), targets) in CASES.items():
        table[name] = {
            target: figures(kernel, arguments, target, **options)
            for target in targets
            if target in (sys.argv[1:] or TARGETS)
        }
    print(json.dumps(table))
