"""The kernels of grpo_loss at their real tile sizes, for test_compile.py."""

from __future__ import annotations

from locus_kernels.grpo_loss import triton as grpo
from locus_kernels.linear_logprob.triton_forward import FINAL_ROWS, FINAL_TILES

from tests.kernels.compile_ahead import Cases, Variant, on, report

PARTIALS = dict.fromkeys(("maximum", "total", "weighted", "target"), "*fp32")
TOKENS = dict.fromkeys(("advantages", "old", "reference", "token_weight"), "*fp32")
RESULTS = {"logprob": "*fp32", "lse": "*fp64", "entropy": "*fp32", "slope": "*fp32", "sums": "*fp32"}
NUMBERS = dict.fromkeys(("lowest", "highest", "kl_coefficient", "log_ratio_clamp", "kl_clamp"), "fp32")
GIVEN = dict.fromkeys(("HAS_OLD", "HAS_REFERENCE", "HAS_WEIGHT"), True)
BLOCK = {"ROWS": FINAL_ROWS, "TILES": FINAL_TILES}
SIZES = dict.fromkeys(("T", "N", "P"), "i32")
OBJECTIVE = {**PARTIALS, **TOKENS, **RESULTS, **SIZES, **NUMBERS, **GIVEN, **BLOCK}
SUM = {"sums": "*fp32", "out": "*fp32", "P": "i32", "BLOCK": grpo.SUM_BLOCK}
CASES: Cases = {
    "objective": on(Variant(grpo.objective_kernel, OBJECTIVE, {})),
    "sum": on(Variant(grpo.sum_kernel, SUM, {})),
}

if __name__ == "__main__":
    report(CASES)
