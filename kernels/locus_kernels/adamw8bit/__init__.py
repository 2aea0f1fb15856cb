"""AdamW with 8-bit moments whose steps stay those of float32 AdamW, and stochastic rounding of bfloat16
weights."""

from locus_kernels.adamw8bit.op import adamw8bit_, new_state
from locus_kernels.adamw8bit.reference import BLOCK, dequantize, from_dynamic_codes

__all__ = ["BLOCK", "adamw8bit_", "dequantize", "from_dynamic_codes", "new_state"]
