"""The cost ledger: what a step must compute, move and hold, counted from a model's shape without weights.
`python -m locus_fast.cost` prints it."""

from locus_fast.cost.flops import (
    group_cost,
    model_flops,
    peak_flops,
    rates,
    repeated_flops,
    step_flops,
    total,
)
from locus_fast.cost.memory import peak_memory
from locus_fast.cost.plan import Plan, plan
from locus_fast.cost.shapes import PUBLISHED, Group, ModelShape, TextShape, VisionShape, group_of
from locus_fast.cost.traffic import step_bytes, step_launches, step_syncs

__all__ = [
    "PUBLISHED",
    "Group",
    "ModelShape",
    "Plan",
    "TextShape",
    "VisionShape",
    "group_cost",
    "group_of",
    "model_flops",
    "peak_flops",
    "peak_memory",
    "plan",
    "rates",
    "repeated_flops",
    "step_bytes",
    "step_flops",
    "step_launches",
    "step_syncs",
    "total",
]
