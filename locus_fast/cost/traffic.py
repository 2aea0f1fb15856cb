"""Bytes, kernel launches and host syncs of a step, counted from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from locus_fast.cost.flops import causal_pairs
from locus_fast.cost.shapes import Group, ModelShape

STATE_BYTES = 2.03  # of a parameter's two AdamW moments: 8 bits each, and a float32 scale for each block of 256


def kept_bytes(shape: ModelShape, width: int = 2) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * shape.text.layers * shape.text.keys * width


def step_bytes(
    shape: ModelShape, microbatches: Sequence[Sequence[Group]], *, checkpointing: bool, reference: bool, repeat: bool = False
) -> dict[str, float]:
    """Bytes of device memory that a step reads and writes for weights, keys and values, gradients and optimizer states, by part: bfloat16 but for
    8-bit AdamW states. Activations are left out. repeat: a trainer that keeps the prompt's keys once a reply, in one pass over prompt and reply.

    A decoding step reads the language model's weights once for all rows, a prompt's keys once a group, and each reply's own past. A pass reads every
    weight once; backward reads it once more for the inputs' gradient, and writes (from the second microbatch on, reads too) the weights' gradient.
    """
    text, kept = shape.text, kept_bytes(shape)
    language = 2 * (text.layers * text.layer_parameters + text.head_parameters)
    out = dict.fromkeys(("decode: weights", "decode: prompt keys", "decode: own keys", "passes: weights", "gradients"), 0.0)
    passes = 2 + checkpointing + reference
    for index, groups in enumerate(microbatches):
        out["decode: weights"] += max(n for group in groups for n in group.fed) * language + 2 * text.head_parameters
        for group in groups:
            out["decode: prompt keys"] += kept * group.prompt * (sum(group.fed) if repeat else max(group.fed))
            out["decode: own keys"] += kept * sum(causal_pairs(n, "exact") for n in group.fed)
        out["passes: weights"] += passes * (2 * shape.parameters + (0 if repeat else language))  # prompts and replies: two passes
        out["gradients"] += (1 if index == 0 else 2) * 2 * shape.parameters
    return out | {"optimizer": shape.parameters * (2 * 2 + 2 + 2 * STATE_BYTES)}


@dataclass(frozen=True)
class Launches:
    """Kernels that the eager modules of `transformers` start in one pass: a + b a layer, with attention as one. Measured on CPU as the dispatched
    operators that are not views; tests/locus_fast/test_cost.py repeats the count."""

    vision: tuple[int, int]  # forward
    vision_backward: tuple[int, int]
    vision_again: int  # a block's recomputation under checkpointing
    text: tuple[int, int]
    text_backward: tuple[int, int]
    text_again: int


LAUNCHES = {
    "qwen2_5_vl": Launches((37, 32), (33, 78), 30, (16, 34), (16, 82), 32),
    "qwen3_vl": Launches((109, 20), (51, 46), 18, (18, 46), (16, 106), 44),
}
# What attention starts a layer beyond the one that is counted: replies and decoding attend in two pieces and merge them.
MERGE, MERGE_BACKWARD = 2, 1
SAMPLE = 8  # a decoding step outside the layers: embedding, head, sampling, bookkeeping
# Host syncs of one forward pass: grid sizes and window bounds that `transformers` reads back in the tower, and two masked selections for each
# language layer that adds DeepStack features.
TOWER_SYNCS = {"qwen2_5_vl": 7, "qwen3_vl": 8}
DEEPSTACK_SYNCS = 2


def step_launches(shape: ModelShape, microbatches: Sequence[Sequence[Group]], *, checkpointing: bool, reference: bool) -> dict[str, int]:
    """Kernel launches of a step by part, without CUDA graphs (which make a decoding step one launch) and without the optimizer's."""
    counts, D, L = LAUNCHES[shape.family], shape.vision.depth, shape.text.layers
    tower = counts.vision[0] + counts.vision[1] * D
    prompt = counts.text[0] + counts.text[1] * L
    back = counts.vision_backward[0] + counts.vision_backward[1] * D + 2 * (counts.text_backward[0] + counts.text_backward[1] * L)
    again = counts.vision_again * D + (2 * counts.text_again + MERGE) * L
    M, steps = len(microbatches), sum(max(n for group in groups for n in group.fed) for groups in microbatches)
    forward = tower + 2 * prompt + MERGE * L
    return {
        "forward": M * forward,
        "decode": steps * (prompt + MERGE * L + SAMPLE),
        "recompute": M * again if checkpointing else 0,
        "backward": M * (back + MERGE_BACKWARD * L),
        "reference": M * forward if reference else 0,
    }


def step_syncs(shape: ModelShape, microbatches: Sequence[Sequence[Group]], *, reference: bool) -> dict[str, int]:
    """Host syncs of a step by cause: where the host waits for the device."""
    each = TOWER_SYNCS[shape.family] + DEEPSTACK_SYNCS * len(shape.vision.deepstack)
    return {
        "vision tower": (1 + reference) * len(microbatches) * each,
        "has every reply ended?": sum(max(n for group in groups for n in group.replies) for groups in microbatches),
        "lengths and flat groups": len(microbatches),
        "gradient norm and metrics": 2,
    }
