"""The kernels of adamw8bit at their real tile sizes, for test_compile.py."""

from __future__ import annotations

import triton.language as tl
from locus_kernels.adamw8bit import triton as adamw

from tests.kernels.compile_ahead import Cases, Variant, on, report


def kernel(value: tl.dtype, slope: tl.dtype, eight_bit: bool = True) -> Variant:
    """adamw8bit_kernel for weights and gradients of these types."""
    pointers = {"jobs": "*i64", "corrections": "*fp32", "gradient_scale": "*fp32"}
    numbers = {"jobs_count": "i32", **dict.fromkeys(("beta1", "beta2", "eps", "weight_decay"), "fp32")}
    constants = {"VALUES": value, "SLOPES": slope, "EIGHT_BIT": eight_bit, "ALIGNED": True, "SEARCH": 10}
    arguments = {**pointers, **numbers, **constants, "ROWS": adamw.ROWS}
    return Variant(adamw.adamw8bit_kernel, arguments, {"num_warps": 4})


CASES: Cases = {
    "adamw8bit, bfloat16": on(kernel(tl.bfloat16, tl.bfloat16)),
    "adamw8bit, float32": on(kernel(tl.float32, tl.float32)),
    "adamw8bit, float32 moments": on(kernel(tl.bfloat16, tl.bfloat16, eight_bit=False)),
}

if __name__ == "__main__":
    report(CASES)
