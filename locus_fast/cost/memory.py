"""Peak memory of a step by part, counted from shapes alone.

What backward needs of one token in one language layer, in elements of the activations' type, for the eager
modules of `transformers`: in each of two norms the output before and after its weight (2 hidden), and its
input in float32; queries, attention output, keys and values; the gate before and after its activation, the up
projection and their product (4 intermediate). A vision block is counted the same way. liger-kernel's
operators, `fused` below, keep of a norm its input as it came and its output, and do without the gate after
its activation. Of a frozen layer the inputs of its weights need not stay; an adapter keeps its matrix's input
in float32. With activation checkpointing only each layer's input stays, and one layer at a time is
recomputed. Keys and values of prompts stay either way.

The decoder keeps its buffers through the step: replies' keys for the longest reply allowed, and a copy of the
prompts', on CUDA rounded up.

The peak is the largest of the step's moments: decoding, the reference's pass, the head's backward, the last
layer's backward of replies, of prompts and of the tower, the gradient of the embedding table, and the
optimizer's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from locus_fast.cost.shapes import (
    EVERYTHING,
    PROMPT_STEP,
    Group,
    ModelShape,
    TextShape,
    Trained,
    VisionShape,
    recomputed,
    rung,
)
from locus_fast.cost.traffic import STATE_BYTES, kept_bytes
from locus_fast.errors import UserError

REFERENCES = ("none", "copy", "int8", "nf4", "host")
# Bytes of a quantised matrix element, its scales included: one float32 for each row (int8, taken as free), or
# a byte for each block of 64 and a float32 for 256 of those (nf4).
QUANTISED = {"int8": 1.0, "nf4": 0.5 + (1 + 4 / 256) / 64}


@dataclass(frozen=True)
class MemorySettings:
    """How a step holds its weights, states and activations; what stays the same for all microbatches of a
    run."""

    reference: str = "none"  # one of REFERENCES
    trained: Trained = EVERYTHING  # what has gradients and states
    quantised: bool = False  # the language layers' matrices are nf4
    max_tokens: int | None = None  # longest reply allowed; by default the longest there is
    static: bool = True  # decoder buffers as on CUDA
    fused: bool = False  # with liger-kernel's operators
    weight_bytes: float = 2  # of each parameter; an adapter's weight has 4
    gradient_bytes: float = 2
    state_bytes: float = STATE_BYTES
    width: int = 2  # bytes of an activation's element
    tile: float = 0  # bytes of the logits that the head holds at a time, 0 for a fused kernel


def text_layer_bytes(
    text: TextShape, width: int, trained: Trained = EVERYTHING, fused: bool = False
) -> float:
    """What backward keeps of one token in one language layer, for activations of `width` bytes; its keys and
    values are counted apart."""
    # of an element: its input, in float32, and for its weight's gradient what that scales
    norm = width if fused else 4 + width * trained.language
    norms = norm * (2 * text.hidden + (text.queries + text.keys) * text.qk_norm)
    # of the matrices, but the attention's output, which is kept anyway
    inputs: float = 2 * text.hidden + text.intermediate
    if trained.rank and width < 4:
        # a float32 copy for each adapter
        inputs = 4 / width * (5 * text.hidden + text.queries + text.intermediate)
    inputs *= trained.language or trained.rank > 0
    between = 4 * 7 * trained.rank
    log_sum_exp = 4 * text.heads
    return (
        norms + between + log_sum_exp + width * (inputs + 2 * text.queries + (3 - fused) * text.intermediate)
    )


def block_bytes(vision: VisionShape, width: int, fused: bool = False) -> float:
    """What backward keeps of one patch in one vision block. Queries and keys after their rotation, the
    product that holds the values, and the output: 6 hidden."""
    norms = 2 * (2 * width + 4 * (vision.gated and not fused)) * vision.hidden
    return (
        norms
        + 4 * vision.heads
        + width * (6 * vision.hidden + (4 - fused if vision.gated else 2) * vision.intermediate)
    )


def tower_ends_bytes(vision: VisionShape, width: int) -> float:
    """What backward keeps of one patch outside the blocks: the mergers' norm, first product, activation and
    output."""
    mergers = (3 + vision.gated) + 4 * len(vision.deepstack)
    return (
        width * mergers * vision.hidden + width * vision.out * (1 + len(vision.deepstack)) / vision.merge**2
    )


def recomputes_last(layers: int, checkpointing: int) -> bool:
    """Whether the last layer is recomputed: another is only when a layer behind it has given back what it
    kept, which is as much."""
    return checkpointing > 0 and (layers - 1) % checkpointing == 0


def decoder_bytes(
    shape: ModelShape, groups: Sequence[Group], max_tokens: int, width: int, static: bool
) -> float:
    """The decoder's buffers for the replies of these groups: keys and values of up to max_tokens tokens each
    and of the prompts, ids and log-probs. static: of the sizes that CUDA graphs are captured for."""
    rows, prompt = sum(len(group.replies) for group in groups), sum(group.prompt for group in groups)
    if static:
        rows, prompt = rung(rows), -(-prompt // PROMPT_STEP) * PROMPT_STEP
    return (rows * max_tokens + prompt) * kept_bytes(shape, width) + 12 * rows * max_tokens


def reference_bytes(
    shape: ModelShape, kind: str, weight_bytes: float = 2, trained: Trained = EVERYTHING
) -> float:
    """Device memory of the reference model: a copy of what is trained (with adapters nothing), or held
    otherwise. Quantised, the language layers' matrices shrink; on the host, two layers are on the device at a
    time, and for the whole pass the embeddings and the head."""
    if kind == "none":
        return 0.0
    text, copied = shape.text, trained.parameters(shape)
    matrices = text.layers * text.matrices
    if kind == "copy":
        return weight_bytes * copied
    if kind == "host":
        paged = max(0, text.layers - 2) * text.layer_parameters * trained.language
        return weight_bytes * (
            copied - paged - shape.vision.depth * shape.vision.block_parameters * trained.vision
        )
    return QUANTISED[kind] * matrices + weight_bytes * (copied - matrices * trained.language)


def moments(
    shape: ModelShape, groups: Sequence[Group], checkpointing: int, how: MemorySettings
) -> dict[str, tuple[float, float, float]]:
    """Bytes of (kept keys and values, activations, workspace) at each moment of a step at which its memory
    may be largest."""
    vision, text, trained, width = shape.vision, shape.text, how.trained, how.width
    N, P = sum(group.patches for group in groups), sum(group.prompt for group in groups)
    rows, scored = sum(len(group.replies) for group in groups), sum(group.scored for group in groups)
    fed, kept = scored - rows, kept_bytes(shape, width)
    layer, block = text_layer_bytes(text, width, trained, how.fused), block_bytes(vision, width, how.fused)
    layers, blocks = recomputed(text.layers, checkpointing), recomputed(vision.depth, checkpointing)
    of_token = layers * width * text.hidden + (text.layers - layers) * layer  # kept in all layers
    of_patch = (blocks * width * vision.hidden + (vision.depth - blocks) * block) * trained.vision
    # the final norm, and the rotations' sines and cosines
    ends = 4 * text.hidden + 2 * width * text.hidden + 4 * width * text.head_dim
    tower = N * (of_patch + tower_ends_bytes(vision, width) * trained.tower)
    prompt, replies = P * (of_token + ends), fed * (of_token + ends)
    own_keys = fed * kept * (text.layers - layers) / text.layers
    # a gradient as large as head or embedding, before it is added to the others
    table = how.gradient_bytes * text.head_parameters * trained.language
    # of a token and of a patch, while their layer's backward runs
    between = width * ((2 - how.fused) * text.intermediate + 4 * text.hidden)
    in_layer = layer * recomputes_last(text.layers, checkpointing) + between
    between = width * ((2 - how.fused * vision.gated) * vision.intermediate + 4 * vision.hidden)
    in_block = block * recomputes_last(vision.depth, checkpointing) + between
    # one weight's gradient, before it is added, and one weight, dequantised
    matrix = how.gradient_bytes * text.hidden * text.intermediate * trained.language
    matrix += width * text.hidden * text.intermediate * how.quantised
    seeing = N * width * (3 * vision.intermediate + 4 * vision.hidden)
    reading = P * width * (3 * text.intermediate + 4 * text.hidden)
    states = scored * text.hidden * width
    of_replies = table * text.tied + matrix + fed * in_layer + P * kept / text.layers
    beside_master_weights = 4 * text.head_parameters * trained.language * (how.state_bytes > 8)
    found = {
        "decoding": (P * kept, tower + prompt, rows * text.vocabulary * 8),
        "head's backward": (
            P * kept + own_keys,
            tower + prompt + replies + states,
            table + states + how.tile,
        ),
        "replies' backward": (P * kept + own_keys, tower + prompt + replies, of_replies),
        "replies' embedding": (2 * P * kept, tower + prompt, table * (1 + text.tied)),
        "prompts' backward": (2 * P * kept, tower + prompt, matrix + P * in_layer),
        "tower's forward": (0.0, tower, seeing),
        "tower's backward": (0.0, N * of_patch, N * in_block * trained.vision),
        "optimizer's step": (0.0, 0.0, beside_master_weights),
    }
    if how.reference != "none":
        found["reference"] = (2 * P * kept, tower + prompt + replies, max(seeing * trained.tower, reading))
    return found


def peak_memory(
    shape: ModelShape,
    groups: Sequence[Group],
    checkpointing: int,
    how: MemorySettings,
    rollout: Sequence[Group] = (),
) -> dict[str, float]:
    """Bytes by part at the largest moment of a step whose biggest microbatch is `groups`; their sum is the
    peak.

    checkpointing: 0, or every how many-th layer is recomputed; rollout: the widest rollout where it is wider
    than `groups`. Gradients are counted in full: from the second microbatch on they are there. Raises
    UserError for a reference that is none of REFERENCES.
    """
    if how.reference not in REFERENCES:
        raise UserError(f"--reference must be one of {', '.join(REFERENCES)}, not '{how.reference}'.")
    vision, text, trained, width = shape.vision, shape.text, how.trained, how.width
    keys, activations, workspace = max(moments(shape, groups, checkpointing, how).values(), key=sum)
    longest = how.max_tokens or max(group.longest for group in groups)
    adapters, matrices = (
        text.layers * text.adapters(trained.rank),
        text.layers * text.matrices * how.quantised,
    )
    moving = trained.parameters(shape) + adapters
    whole = how.weight_bytes * (shape.parameters - matrices)
    # float32 as they come, and in the tower's type
    pixels = sum(group.patches for group in groups) * vision.patch_values * (4 + width * (width < 4))
    return {
        "weights": whole + QUANTISED["nf4"] * matrices + 4 * adapters,
        "gradients": how.gradient_bytes * moving,
        "optimizer states": how.state_bytes * moving,
        "reference": reference_bytes(shape, how.reference, how.weight_bytes, trained),
        "pixels": pixels,
        "decoder": decoder_bytes(shape, rollout or groups, longest, width, how.static),
        "kept keys and values": keys,
        "activations": activations,
        "workspace": workspace,
    }
