"""FLOPs of a step, counted from shapes alone.

A matrix product of [m, k] and [k, n] is 2 m k n FLOPs. A pass over tokens costs that for every weight matrix;
attention costs 4 D FLOPs a head for each query-key pair (scores, and their product with the values). The
backward of a product is two products. Norms, rotations and activations are left out, as everywhere in this
field.

The floor is what any exact step must do: each prompt and each reply token once forward and twice backward
(once through what is frozen, and not at all before the first thing that is trained), the recomputation that
activation checkpointing asks for, the reference once, and decoding. What is spent (`executed`) adds what
fused kernels do again in backward, the logits' tiles and the attention scores, and the decoding of rows that
ended before they were moved out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from locus_fast.cost.shapes import (
    EVERYTHING,
    Group,
    ModelShape,
    TextShape,
    Trained,
    VisionShape,
    recomputed,
    rung,
)

COLUMNS = ("rollout", "forward", "recompute", "backward", "reference")
PROMPT_ROWS = ("vision", "vision attention", "prompt", "prompt attention")
Table = dict[str, dict[str, float]]  # row (a part of the model) -> column (a pass) -> FLOPs

# Dense bfloat16 FLOP/s by the device's name; the first that occurs in it holds. From the makers' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: str) -> float | None:
    """The device's dense bfloat16 FLOP/s, by its name (`torch.cuda.get_device_name`); None where it is not
    known, as on a CPU."""
    return next(
        (
            peak
            for name, peak in PEAK_FLOPS.items()
            if re.search(rf"\b{re.escape(name)}\b", device, re.IGNORECASE)
        ),
        None,
    )


def causal_pairs(tokens: int, causal: str) -> int:
    """Query-key pairs of a causal sequence: the triangle with its diagonal, or the whole square as
    `torch.utils.flop_counter` counts it."""
    return tokens * (tokens + 1) // 2 if causal == "exact" else tokens * tokens


def patches(groups: Iterable[Group]) -> int:
    return sum(group.patches for group in groups)


def block_flops(vision: VisionShape) -> tuple[int, int]:
    """FLOPs a patch of one vision block's matrices, and of its last one alone."""
    last = 2 * vision.hidden * vision.intermediate
    return 8 * vision.hidden**2 + (3 if vision.gated else 2) * last, last


def tower_ends(vision: VisionShape) -> tuple[int, int]:
    """FLOPs a patch of the patch embedding, and of the mergers (DeepStack's included)."""
    wide = vision.hidden * vision.merge**2
    mergers = 1 + len(vision.deepstack)
    return 2 * vision.patch_values * vision.hidden, mergers * 2 * wide * (
        wide + vision.out
    ) // vision.merge**2


def step_flops(
    shape: ModelShape,
    groups: Sequence[Group],
    *,
    checkpointing: int,
    reference: bool,
    trained: Trained = EVERYTHING,
    executed: bool = False,
    causal: str = "exact",
) -> Table:
    """FLOPs of one microbatch's step by part and pass; those of a step are the sums over its microbatches.

    reference: whether there is a KL term; trained: what has gradients; executed: what is spent rather than
    the floor; causal: "exact", or "square" to compare with `torch.utils.flop_counter`. Groups that are not
    active stop after decoding. checkpointing: 0, or every how many-th layer is recomputed, all but its last
    product, which nothing in backward reads.
    """
    active = [group for group in groups if group.active]
    # inactive groups' prompts ride through the packed backward of the others'
    through = list(groups) if executed and active else active
    passes: dict[str, Any] = {
        "checkpointing": checkpointing,
        "trained": trained,
        "twice": 2.5 if executed else 2.0,
    }
    table = {
        **vision_flops(shape.vision, groups, active, through, **passes),
        **language_flops(shape.text, groups, active, through, causal=causal, executed=executed, **passes),
    }
    # a frozen tower sees once, for the reference too
    if not trained.tower and (not executed or len(active) == len(groups)):
        table["vision"]["reference"] = table["vision attention"]["reference"] = 0
    if not reference:
        for row in table.values():
            row["reference"] = 0
    return table | decode_flops(shape, groups, executed, trained.rank)


def vision_flops(
    vision: VisionShape,
    groups: Sequence[Group],
    active: Sequence[Group],
    through: Sequence[Group],
    *,
    checkpointing: int,
    trained: Trained,
    twice: float,
) -> Table:
    """The tower's rows of `step_flops`. through: groups that go through backward; twice: attention's backward
    over its forward."""
    block, last = block_flops(vision)
    embed, mergers = tower_ends(vision)
    again = recomputed(vision.depth, checkpointing) * (block - last)
    back = (embed + 2 * vision.depth * block) * trained.vision
    # the weights' gradients and the inputs', which begin with a norm of the projector's
    back += mergers * (trained.projector + trained.tower)

    def row(flops: Callable[[Iterable[Group]], float], again: float, backward: float) -> dict[str, float]:
        return {
            "forward": flops(groups),
            "recompute": again,
            "backward": backward,
            "reference": flops(active),
        }

    def matrices(chosen: Iterable[Group]) -> float:
        return patches(chosen) * (embed + vision.depth * block + mergers)

    def pairs(chosen: Iterable[Group], every: int = 1) -> float:
        return 4 * vision.hidden * sum(vision.pairs(*grid, every) for group in chosen for grid in group.grids)

    return {
        "vision": row(matrices, patches(through) * again * trained.vision, patches(through) * back),
        "vision attention": row(
            pairs,
            pairs(through, checkpointing) if checkpointing and trained.vision else 0,
            twice * pairs(through) * trained.vision,
        ),
    }


def language_flops(
    text: TextShape,
    groups: Sequence[Group],
    active: Sequence[Group],
    through: Sequence[Group],
    *,
    checkpointing: int,
    trained: Trained,
    twice: float,
    causal: str,
    executed: bool,
) -> Table:
    """The language model's rows of `step_flops`, but for decoding. Adapters run beside every matrix, but not
    in the reference."""
    L, whole, rank = text.layers, trained.language, trained.rank
    layer, beside = 2 * text.matrices, 2 * text.adapters(rank)
    last = 2 * text.hidden * (rank or text.intermediate)
    # the first layer's inputs' gradient, which frozen embeddings do not want
    entry = 2 * text.hidden * (text.queries + 2 * text.keys + 3 * rank)
    again = recomputed(text.layers, checkpointing) * (layer + beside - last)
    pixels = whole or trained.tower  # whether prompts have a gradient at the first layer
    back = L * (layer * (1 + whole) + 2 * beside)
    fed, scored = sum(sum(group.fed) for group in active), sum(group.scored for group in active)
    P, active_P, through_P = (sum(group.prompt for group in chosen) for chosen in (groups, active, through))

    def prompt_pairs(chosen: Iterable[Group]) -> int:
        return 4 * text.queries * L * sum(causal_pairs(group.prompt, causal) for group in chosen)

    def row(forward: float, again: float, backward: float, reference: float) -> dict[str, float]:
        return {"forward": forward, "recompute": again, "backward": backward, "reference": reference}

    def attention(forward: float, pairs: float, reference: float) -> dict[str, float]:
        return row(forward, pairs * recomputed(L, checkpointing) // L, twice * pairs, reference)

    own = (
        4
        * text.queries
        * L
        * sum(n * group.prompt + causal_pairs(n, causal) for group in active for n in group.fed)
    )
    head = 2 * scored * text.head_parameters
    prompt_back, reply_back = through_P * (back - entry * (not pixels)), fed * (back - entry * (not whole))
    return {
        "prompt": row(P * L * (layer + beside), through_P * again, prompt_back, active_P * L * layer),
        "prompt attention": attention(prompt_pairs(groups), prompt_pairs(through), prompt_pairs(active)),
        "replies": row(fed * L * (layer + beside), fed * again, reply_back, fed * L * layer),
        "reply attention": attention(own, own, own),
        "head": row(head, head * executed, head * (1 + whole), head),
    }


def decode_flops(shape: ModelShape, groups: Sequence[Group], executed: bool, rank: int = 0) -> Table:
    """FLOPs of sampling, the last three rows of the table. executed: rows go on until the next smaller number
    of rows holds all that still run.

    A prompt's first logits are computed once for all its replies. rank: of adapters, 0 for none."""
    text = shape.text
    lengths = sorted(n for group in groups for n in group.replies)
    if executed:
        rows, before = 0, 1
        for ended, n in enumerate(lengths):
            rows += (n - before) * min(len(lengths), rung(len(lengths) - ended))
            before = n
    else:
        rows = sum(n - 1 for n in lengths)
    pairs = sum(n * group.prompt + causal_pairs(n, "exact") for group in groups for n in group.fed)
    return {
        "decode": {"rollout": 2 * (text.matrices + text.adapters(rank)) * text.layers * rows},
        "decode attention": {"rollout": 4 * text.queries * text.layers * pairs},
        "decode head": {"rollout": 2 * text.head_parameters * (len(groups) + rows)},
    }


def repeated_flops(
    shape: ModelShape,
    groups: Sequence[Group],
    *,
    checkpointing: int,
    reference: bool,
    trained: Trained = EVERYTHING,
) -> Table:
    """The same step by a trainer that runs vision tower and prompt again for every reply in every pass, its
    sampler's prefill included.

    Old log-probs are taken to be free (aligned sampler and trainer), and inactive groups are trained on like
    any other. This favours it: padding, a second pass for old log-probs and what its kernels recompute are
    not counted.
    """
    one_each = [Group(group.grids, group.prompt, (n,)) for group in groups for n in group.replies]
    table = step_flops(shape, one_each, checkpointing=checkpointing, reference=reference, trained=trained)
    for part in PROMPT_ROWS:
        table[part]["rollout"] = table[part]["forward"]
    return table


def total(table: Table, columns: Iterable[str] = COLUMNS) -> float:
    return sum(passes.get(column, 0) for passes in table.values() for column in columns)


def model_flops(
    shape: ModelShape, groups: Sequence[Group], *, reference: bool, trained: Trained = EVERYTHING
) -> float:
    """What MFU counts: the floor without any recomputation, vision tower and decoding included, over one
    microbatch."""
    return total(step_flops(shape, groups, checkpointing=0, reference=reference, trained=trained))


def rates(flops: float, seconds: float, device: str) -> dict[str, float]:
    """Metrics of `flops` model FLOPs in `seconds`: FLOP/s, and MFU where the device's peak is known."""
    achieved = flops / seconds
    peak = peak_flops(device)
    return {"model_flops_per_s": achieved} | ({} if peak is None else {"mfu": achieved / peak})


def group_cost(
    shape: ModelShape, grids: Sequence[tuple[int, int]], prompt_tokens: int, reply_tokens: int
) -> float:
    """A group's forward pass in language-token equivalents, for packing: the FLOPs of its vision tower,
    prompt and replies over those of one token's language layers without attention.

    grids: (rows, columns) of patches; reply_tokens: of all its replies together. The replies' attention to
    themselves, which is short, is left out.
    """
    vision, text = shape.vision, shape.text
    tower = sum(h * w for h, w in grids) * (vision.depth * block_flops(vision)[0] + sum(tower_ends(vision)))
    pixels = 4 * vision.hidden * sum(vision.pairs(*grid) for grid in grids)
    pairs = causal_pairs(prompt_tokens, "exact") + reply_tokens * prompt_tokens
    beside = tower + pixels + 4 * text.queries * text.layers * pairs
    return prompt_tokens + reply_tokens + beside / (2 * text.matrices * text.layers)
