"""The kernels of patchify at their real tile sizes, for test_compile.py."""

from __future__ import annotations

from locus_kernels.patchify import triton as patches

from tests.kernels.compile_ahead import Cases, Variant, on, report

POINTERS = {"jobs": "*i64", "job_of_program": "*i64", "taps": "*i32", "middle": "*u8"}
ROWS, COLUMNS, VALUES = patches.TILE
SCALES = dict.fromkeys(("scale_r", "scale_g", "scale_b", "shift_r", "shift_g", "shift_b"), "fp32")
LAYOUT = {"SIDE": 14, "FRAMES": 2, "MERGE": 2}
FIRST = Variant(patches.first_kernel, {**POINTERS, "ROWS": ROWS, "COLUMNS": COLUMNS}, {})
SECOND = Variant(
    patches.second_kernel,
    {**POINTERS, "out": "*fp32", **SCALES, **LAYOUT, "VALUES": VALUES},
    {"enable_fp_fusion": False},
)
CASES: Cases = {"patchify first": on(FIRST), "patchify second": on(SECOND)}

if __name__ == "__main__":
    report(CASES)
