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
# a byte for each block of 64 and a
# float32 for 256 of those (nf4).
QUANTISED = {"int8": 1.0, "nf4": 0.5 + (1 + 4 / 256) / 64}


def text_layer_bytes(
    text: TextShape, width: int, trained: Trained = EVERYTHING, fused: bool = False
) -> float:
    """What backward keeps of one token in one language layer, for activations of `width` bytes; its keys and
    values are counted apart."""
    norm = (
        width if fused else 4 + width * trained.language
    )  # of an element: its input, in float32, and for its weight's gradient what that scales
    norms = norm * (2 * text.hidden + (text.queries + text.keys) * text.qk_norm)
    inputs: float = (
        2 * text.hidden + text.intermediate
    )  # of the matrices, but the attention's output, which is kept anyway
    if trained.rank and width < 4:
        inputs = (
            4 / width * (5 * text.hidden + text.queries + text.intermediate)
        )  # a float32 copy for each adapter
    inputs *= trained.language or trained.rank > 0
    between = 4 * 7 * trained.rank
    log_sum_exp = 4 * text.heads
    return (
        norms + between + log_sum_exp + width * (inputs + 2 * text.queries + (3 - fused) * text.intermediate)
    )


def block_bytes(vision: VisionShape, width: int, fused: bool = False) -> float:
    """The same of one patch in one vision block. Queries and keys after their rotation, the product that
    holds the values, and the output: 6 hidden."""
    norms = 2 * (2 * width + 4 * (vision.gated and not fused)) * vision.hidden
    return (
        norms
        + 4 * vision.heads
        + width * (6 * vision.hidden + (4 - fused if vision.gated else 2) * vision.intermediate)
    )


def tower_ends_bytes(vision: VisionShape, width: int) -> float:
    """The same of one patch outside the blocks: the mergers' norm, first product, activation and output."""
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


def peak_memory(
    shape: ModelShape,
    groups: Sequence[Group],
    *,
    checkpointing: int,
    reference: str = "none",
    trained: Trained = EVERYTHING,
    quantised: bool = False,
    max_tokens: int | None = None,
    rollout: Sequence[Group] = (),
    static: bool = True,
    fused: bool = False,
    weight_bytes: float = 2,
    gradient_bytes: float = 2,
    state_bytes: float = STATE_BYTES,
    width: int = 2,
    tile: float = 0,
) -> dict[str, float]:
    """Bytes by part at the largest moment of a step whose biggest microbatch is `groups`; their sum is the
    peak.

    checkpointing: 0, or every how many-th layer is recomputed; reference: one of REFERENCES; trained: what
    has gradients and states; quantised: the language layers' matrices are nf4; max_tokens: longest reply
    allowed, by default the longest there is; rollout: the widest rollout where it is wider than `groups`;
    static: decoder buffers as on CUDA; fused: with liger-kernel's operators; weight_bytes, gradient_bytes,
    state_bytes: of each parameter (an adapter's weight has 4); width: of an activation's element; tile: the
    logits that the head holds at a time (0 for a fused kernel). Gradients are counted in full: from the
    second microbatch on they are there.
    """
    if reference not in REFERENCES:
        raise UserError(f"--reference must be one of {', '.join(REFERENCES)}, not '{reference}'.")
    vision, text = shape.vision, shape.text
    N, P = sum(group.patches for group in groups), sum(group.prompt for group in groups)
    rows, scored = sum(len(group.replies) for group in groups), sum(group.scored for group in groups)
    fed, longest = scored - rows, max(group.longest for group in groups)
    kept = kept_bytes(shape, width)
    layer, block = text_layer_bytes(text, width, trained, fused), block_bytes(vision, width, fused)
    layers, blocks = recomputed(text.layers, checkpointing), recomputed(vision.depth, checkpointing)
    of_token = layers * width * text.hidden + (text.layers - layers) * layer  # kept in all layers
    of_patch = (blocks * width * vision.hidden + (vision.depth - blocks) * block) * trained.vision
    ends = (
        4 * text.hidden + 2 * width * text.hidden + 4 * width * text.head_dim
    )  # the final norm, and the rotations' sines and cosines
    tower = N * (of_patch + tower_ends_bytes(vision, width) * trained.tower)
    prompt, replies = P * (of_token + ends), fed * (of_token + ends)
    own_keys = fed * kept * (text.layers - layers) / text.layers
    table = (
        gradient_bytes * text.head_parameters * trained.language
    )  # as large as head or embedding, before it is added to the others
    in_layer = layer * recomputes_last(text.layers, checkpointing) + width * (
        (2 - fused) * text.intermediate + 4 * text.hidden
    )  # of a token whose layer is
    in_block = block * recomputes_last(vision.depth, checkpointing) + width * (
        (2 - fused * vision.gated) * vision.intermediate + 4 * vision.hidden
    )  # in backward
    matrix = (
        gradient_bytes * text.hidden * text.intermediate * trained.language
    )  # one weight's gradient, before it is added
    matrix += width * text.hidden * text.intermediate * quantised  # one weight, dequantised
    seeing = N * width * (3 * vision.intermediate + 4 * vision.hidden)
    reading = P * width * (3 * text.intermediate + 4 * text.hidden)
    states = scored * text.hidden * width
    moments = {  # (keys and values, activations, workspace)
        "decoding": (P * kept, tower + prompt, rows * text.vocabulary * 8),
        "head's backward": (P * kept + own_keys, tower + prompt + replies + states, table + states + tile),
        "replies' backward": (
            P * kept + own_keys,
            tower + prompt + replies,
            table * text.tied + matrix + fed * in_layer + P * kept / text.layers,
        ),
        "replies' embedding": (2 * P * kept, tower + prompt, table * (1 + text.tied)),
        "prompts' backward": (2 * P * kept, tower + prompt, matrix + P * in_layer),
        "tower's forward": (0.0, tower, seeing),
        "tower's backward": (0.0, N * of_patch, N * in_block * trained.vision),
        "optimizer's step": (
            0.0,
            0.0,
            4 * text.head_parameters * trained.language * (state_bytes > 8),
        ),  # beside master weights
    }
    if reference != "none":
        moments["reference"] = (2 * P * kept, tower + prompt + replies, max(seeing * trained.tower, reading))
    keys, activations, workspace = max(moments.values(), key=sum)
    adapters, matrices = text.layers * text.adapters(trained.rank), text.layers * text.matrices * quantised
    moving = trained.parameters(shape) + adapters
    return {
        "weights": weight_bytes * (shape.parameters - matrices) + QUANTISED["nf4"] * matrices + 4 * adapters,
        "gradients": gradient_bytes * moving,
        "optimizer states": state_bytes * moving,
        "reference": reference_bytes(shape, reference, weight_bytes, trained),
        "pixels": N
        * vision.patch_values
        * (4 + width * (width < 4)),  # float32 as they come, and in the tower's type
        "decoder": decoder_bytes(shape, rollout or groups, max_tokens or longest, width, static),
        "kept keys and values": keys,
        "activations": activations,
        "workspace": workspace,
    }
