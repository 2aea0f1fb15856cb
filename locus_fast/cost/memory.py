"""Peak memory of a step by part, counted from shapes alone.

What backward needs of one token in one language layer, in elements of the activations' type, for the eager modules of `transformers`: in each of two
norms the output before and after its weight (2 hidden), and its input in float32; queries, attention output, keys and values; the gate before and
after its activation, the up projection and their product (4 intermediate). A vision block is counted the same way. With activation checkpointing
only each layer's input stays, and one layer at a time is recomputed. Keys and values of prompts stay either way.

The peak is the largest of the step's moments: decoding, the reference's pass, the head's backward, the first layer's backward of replies, of
prompts and of the tower, and the gradient of the embedding table.
"""

from __future__ import annotations

from collections.abc import Sequence

from locus_fast.cost.shapes import Group, ModelShape, TextShape, VisionShape
from locus_fast.cost.traffic import STATE_BYTES, kept_bytes
from locus_fast.errors import UserError

REFERENCES = ("none", "bf16", "int8", "nf4", "host")
# Bytes of a quantised matrix element, its scales included: one float32 for each row (int8, taken as free), or for each block of 64 (nf4).
QUANTISED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}


def text_layer_bytes(text: TextShape, width: int) -> float:
    """What backward keeps of one token in one language layer, for activations of `width` bytes; its keys and values are counted apart."""
    norms = 2 * (4 + 2 * width) * text.hidden
    per_head = (4 + width) * (text.queries + text.keys) if text.qk_norm else 0
    log_sum_exp = 4 * text.heads
    return norms + per_head + log_sum_exp + width * (2 * text.queries + 4 * text.intermediate)


def block_bytes(vision: VisionShape, width: int) -> float:
    """The same of one patch in one vision block. Queries and keys after their rotation, the product that holds the values, and the output: 6
    hidden."""
    norms = 2 * ((4 + 2 * width) if vision.gated else 2 * width) * vision.hidden
    return norms + 4 * vision.heads + width * (6 * vision.hidden + (4 if vision.gated else 2) * vision.intermediate)


def tower_ends_bytes(vision: VisionShape, width: int) -> float:
    """The same of one patch outside the blocks: the mergers' norm, first product, activation and output."""
    mergers = (3 + vision.gated) + 4 * len(vision.deepstack)
    return width * mergers * vision.hidden + width * vision.out * (1 + len(vision.deepstack)) / vision.merge**2


def reference_bytes(shape: ModelShape, kind: str) -> float:
    """Device memory of the reference model. Quantised, its layers' matrices and its tower shrink and embeddings and head stay bfloat16; on the host,
    two layers are on the device at a time, and the head."""
    if kind == "none":
        return 0.0
    if kind == "bf16":
        return 2.0 * shape.parameters
    text = shape.text
    if kind == "host":
        return 2.0 * (2 * text.layer_parameters + text.head_parameters)
    matrices = text.layers * text.matrices + shape.vision.parameters
    return QUANTISED[kind] * matrices + 2.0 * (shape.parameters - matrices)


def peak_memory(
    shape: ModelShape,
    groups: Sequence[Group],
    *,
    checkpointing: bool,
    reference: str = "none",
    weight_bytes: float = 2,
    gradient_bytes: float = 2,
    state_bytes: float = STATE_BYTES,
    width: int = 2,
    tile: float = 0,
) -> dict[str, float]:
    """Bytes by part at the largest moment of a step whose biggest microbatch is `groups`; their sum is the peak.

    reference: one of REFERENCES; weight_bytes, gradient_bytes, state_bytes: of each parameter; width: of an activation's element; tile: the logits
    that the head holds at a time (0 for a fused kernel). Gradients are counted in full: from the second microbatch on they are there.
    """
    if reference not in REFERENCES:
        raise UserError(f"--reference must be one of {', '.join(REFERENCES)}, not '{reference}'.")
    vision, text = shape.vision, shape.text
    N, P = sum(group.patches for group in groups), sum(group.prompt for group in groups)
    lengths = [n for group in groups for n in group.replies]
    rows, scored, fed, longest = len(lengths), sum(lengths), sum(lengths) - len(lengths), max(lengths)
    kept = kept_bytes(shape, width)
    layer, block = text_layer_bytes(text, width), block_bytes(vision, width)
    once = (width * text.hidden, width * vision.hidden) if checkpointing else (layer, block)  # kept of each token and patch, each layer
    ends = 4 * text.hidden + 2 * width * text.hidden + 4 * width * text.head_dim  # the final norm, and the rotations' sines and cosines
    tower = N * (vision.depth * once[1] + tower_ends_bytes(vision, width))
    prompt, replies = P * (text.layers * once[0] + ends), fed * (text.layers * once[0] + ends)
    own_keys = 0 if checkpointing else fed * kept
    table = gradient_bytes * text.head_parameters  # a gradient as large as the head or the embedding, before it is added to the others
    in_layer = layer * checkpointing + width * (2 * text.intermediate + 4 * text.hidden)  # of a token whose layer is in backward
    in_block = block * checkpointing + width * (2 * vision.intermediate + 4 * vision.hidden)
    matrix = gradient_bytes * text.hidden * text.intermediate  # one weight's gradient, before it is added
    states = scored * text.hidden * width
    moments = {  # (keys and values, activations, workspace)
        "decoding": (P * kept + rows * (longest - 1) * kept, tower + prompt, rows * text.vocabulary * (width + 4)),
        "head's backward": (P * kept + own_keys, tower + prompt + replies + states, table + states + tile),
        "replies' backward": (P * kept + own_keys, tower + prompt + replies, table * text.tied + matrix + fed * in_layer + P * kept / text.layers),
        "prompts' backward": (2 * P * kept, tower + prompt, table * text.tied + matrix + P * in_layer),
        "embedding's gradient": (0.0, tower + P * width * text.hidden, 2 * table),
        "tower's backward": (0.0, N * vision.depth * once[1], N * in_block),
    }
    if reference != "none":
        moments["reference"] = (2 * P * kept, tower + prompt + replies, P * width * (3 * text.intermediate + 4 * text.hidden))
    keys, activations, workspace = max(moments.values(), key=sum)
    return {
        "weights": weight_bytes * shape.parameters,
        "gradients": gradient_bytes * shape.parameters,
        "optimizer states": state_bytes * shape.parameters,
        "reference": reference_bytes(shape, reference),
        "pixels": N * vision.patch_values * (4 + width * (width < 4)),  # float32 as they come, and in the tower's type
        "kept keys and values": keys,
        "activations": activations,
        "workspace": workspace,
    }
