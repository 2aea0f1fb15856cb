"""Bytes, kernel launches and host syncs of a step, counted from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from locus_fast.cost.shapes import EVERYTHING, Group, ModelShape, Trained, recomputed

# of a parameter's two AdamW moments: 8 bits each, and three float32 a block of 256
STATE_BYTES = 2 + 12 / 256


def kept_bytes(shape: ModelShape, width: int = 2) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * shape.text.layers * shape.text.keys * width


def step_bytes(
    shape: ModelShape,
    microbatches: Sequence[Sequence[Group]],
    *,
    checkpointing: int,
    reference: bool,
    repeat: bool = False,
    trained: Trained = EVERYTHING,
    matrix_bytes: float = 2,
    gradient_bytes: float = 2,
    state_bytes: float = STATE_BYTES,
) -> dict[str, float]:
    """Bytes of device memory that a step reads and writes for weights, keys and values, gradients and
    optimizer states, by part: bfloat16 but for 8-bit AdamW states. Activations are left out. repeat: a
    trainer that keeps the prompt's keys once a reply, in one pass over prompt and reply.

    A decoding step reads the language model's weights once for all rows, a prompt's keys once a group, and
    each reply's own past. A pass reads every weight once; backward reads it once more for the inputs'
    gradient, and writes (from the second microbatch on, reads too) the weights' gradient. trained: what has
    gradients and states; matrix_bytes: of an element of the language layers' matrices (less if they are
    quantised); gradient_bytes, state_bytes: of each trained parameter, an adapter's weight having as many
    bytes as its gradient.
    """
    text, kept = shape.text, kept_bytes(shape)
    adapters = text.layers * text.adapters(trained.rank) * gradient_bytes
    less = (2 - matrix_bytes) * text.layers * text.matrices
    language = 2 * (text.layers * text.layer_parameters + text.head_parameters) + adapters - less
    moving = trained.parameters(shape) + text.layers * text.adapters(trained.rank)
    out = dict.fromkeys(
        ("decode: weights", "decode: prompt keys", "decode: own keys", "passes: weights", "gradients"), 0.0
    )
    passes = 2 + recomputed(text.layers, checkpointing) / text.layers + reference
    for index, groups in enumerate(microbatches):
        out["decode: weights"] += (
            max(group.longest for group in groups) - 1
        ) * language + 2 * text.head_parameters
        for group in groups:
            fed = group.scored - len(group.replies) if repeat else group.longest - 1
            out["decode: prompt keys"] += kept * group.prompt * fed
            out["decode: own keys"] += kept * group.own_pairs
        # prompts and replies: two passes
        out["passes: weights"] += passes * (
            2 * shape.parameters + adapters - less + (0 if repeat else language)
        )
        out["gradients"] += (1 if index == 0 else 2) * gradient_bytes * moving
    return out | {"optimizer": moving * (2 * gradient_bytes + gradient_bytes + 2 * state_bytes)}


@dataclass(frozen=True)
class Launches:
    """Kernels that a model starts in one pass in bfloat16: a + b a layer, with attention over packed
    sequences as one. Counted as the operators that are not views, and liger-kernel's own, on the path that
    CUDA takes; tests/locus_fast/cost/test_launches.py repeats the count."""

    vision: tuple[int, int]  # forward
    vision_backward: tuple[int, int]
    vision_again: int  # a block's recomputation under checkpointing
    text: tuple[int, int]
    text_backward: tuple[int, int]
    text_again: int


LAUNCHES = {  # (architecture, whether norms, gates and rotations are fused)
    ("qwen2_5_vl", False): Launches((29, 40), (35, 90), 38, (24, 38), (26, 91), 36),
    ("qwen2_5_vl", True): Launches((22, 14), (22, 50), 12, (17, 14), (12, 52), 12),
    ("qwen3_vl", False): Launches((30, 24), (53, 54), 22, (28, 54), (26, 119), 52),
    ("qwen3_vl", True): Launches((30, 13), (53, 40), 11, (21, 16), (13, 56), 14),
}
# A layer, beyond the one attention that is counted: replies attend in two pieces and merge them, decoding
# writes its keys.
MERGE, MERGE_BACKWARD, DECODE = 8, 5, 3
# a decoding step outside the layers: embedding, last norm, head, sampling, bookkeeping; by fused
SAMPLE = {
    False: 44,
    True: 37,
}


def step_launches(
    shape: ModelShape,
    microbatches: Sequence[Sequence[Group]],
    *,
    checkpointing: int,
    reference: bool,
    fused: bool,
) -> dict[str, int]:
    """Kernel launches of a step by part, without CUDA graphs (which make a decoding step one launch) and
    without the optimizer's. fused: with liger-kernel's operators (locus_fast.fused)."""
    counts, D, L = LAUNCHES[shape.architecture, fused], shape.vision.depth, shape.text.layers
    tower = counts.vision[0] + counts.vision[1] * D
    prompt = counts.text[0] + counts.text[1] * L
    back = (
        counts.vision_backward[0]
        + counts.vision_backward[1] * D
        + 2 * (counts.text_backward[0] + counts.text_backward[1] * L)
    )
    again = counts.vision_again * recomputed(D, checkpointing) + (2 * counts.text_again + MERGE) * recomputed(
        L, checkpointing
    )
    M, steps = len(microbatches), sum(max(group.longest for group in groups) - 1 for groups in microbatches)
    forward = tower + 2 * prompt + MERGE * L
    return {
        "forward": M * forward,
        "decode": steps * ((counts.text[1] + DECODE) * L + SAMPLE[fused]),
        "recompute": M * again,
        "backward": M * (back + MERGE_BACKWARD * L),
        "reference": M * forward if reference else 0,
    }


def step_syncs(microbatches: Sequence[Sequence[Group]]) -> dict[str, int]:
    """Host syncs of a step by cause: where the host waits for the device. No pass and no decoding step has
    one (tests/locus_fast/model/test_no_waiting.py)."""
    return {"lengths and zero-variance groups": len(microbatches), "gradient norm and metrics": 1}
