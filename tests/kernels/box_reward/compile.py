"""The kernels of box_reward at their real tile sizes, for test_compile.py."""

from __future__ import annotations

from locus_kernels.box_reward import triton as box
from locus_kernels.box_reward.triton_shapes import SHAPES

from tests.kernels.compile_ahead import Cases, Variant, on, report


def kernel(group: int, groups: int, reward: bool, ids: str = "*i64") -> Variant:
    """box_reward_kernel for groups of `group` replies, `groups` of them a program."""
    inputs = {
        "ids": ids, "lengths": "*i64", "offsets": "*i32", "classes": "*u8",
        "transitions": "*i16", "final": "*u8", "target": "*fp32",
    }  # fmt: skip
    outputs = {
        "box": "*fp32", "valid": "*u8", "format_ok": "*u8", "iou": "*fp32",
        "reward": "*fp32", "advantage": "*fp32", "zero_variance": "*u8",
    }  # fmt: skip
    integers = ("rows", "tokens", "vocab_size", "group_size", "stride_r", "stride_l", "stride_length")
    numbers = dict.fromkeys(integers, "i32")
    weights = dict.fromkeys(("shape_weight", "format_weight", "rising"), "fp32")
    constants = {"SHAPE": SHAPES["giou"], "READ": 2, "FORMAT": 2, "REWARD": reward, "NORMALIZE": True}
    tile = {"GROUPS": groups, "BLOCK": group, "UNROLL": 8}
    options = {"num_warps": max(1, min(16, groups * group // 32)), "enable_fp_fusion": False}
    return Variant(
        box.box_reward_kernel, {**inputs, **outputs, **numbers, **weights, **constants, **tile}, options
    )


CASES: Cases = {
    "box_reward, groups of 8": on(kernel(8, 4, True)),
    "box_reward, groups of 512": on(kernel(512, 1, True), "sm_80"),
    "read_boxes, int32 ids": on(kernel(1, 32, False, "*i32"), "sm_90"),
}

if __name__ == "__main__":
    report(CASES)
