"""FLOPs of a step, counted from shapes alone.

A matrix product of [m, k] and [k, n] is 2 m k n FLOPs. A pass over tokens costs that for every weight matrix; attention costs 4 D FLOPs a head for
each query-key pair (scores, and their product with the values). The backward of a product is two products. Norms, rotations and activations are
left out, as everywhere in this field.

The floor is what any exact step must do: each prompt and each reply token once forward and twice backward, the recomputation that activation
checkpointing asks for, the reference once, and decoding. What is spent (`executed`) adds what fused kernels do again in backward, the logits' tiles
and the attention scores, and the decoding of rows that ended before they were moved out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from locus_fast.cost.shapes import Group, ModelShape, VisionShape, recomputed, rung

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
    """The device's dense bfloat16 FLOP/s, by its name (`torch.cuda.get_device_name`); None where it is not known, as on a CPU."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{re.escape(name)}\b", device, re.IGNORECASE)), None)


def causal_pairs(tokens: int, causal: str) -> int:
    """Query-key pairs of a causal sequence: the triangle with its diagonal, or the whole square as `torch.utils.flop_counter` counts it."""
    return tokens * (tokens + 1) // 2 if causal == "exact" else tokens * tokens


def block_flops(vision: VisionShape) -> tuple[int, int]:
    """FLOPs a patch of one vision block's matrices, and of its last one alone."""
    last = 2 * vision.hidden * vision.intermediate
    return 8 * vision.hidden**2 + (3 if vision.gated else 2) * last, last


def tower_ends(vision: VisionShape) -> tuple[int, int]:
    """FLOPs a patch of the patch embedding, and of the mergers (DeepStack's included)."""
    wide = vision.hidden * vision.merge**2
    mergers = 1 + len(vision.deepstack)
    return 2 * vision.patch_values * vision.hidden, mergers * 2 * wide * (wide + vision.out) // vision.merge**2


def step_flops(
    shape: ModelShape,
    groups: Sequence[Group],
    *,
    checkpointing: int,
    reference: bool,
    train_vision: bool = True,
    executed: bool = False,
    causal: str = "exact",
) -> Table:
    """FLOPs of one microbatch's step by part and pass; those of a step are the sums over its microbatches.

    reference: whether there is a KL term; executed: what is spent rather than the floor; causal: "exact", or "square" to compare with
    `torch.utils.flop_counter`. Groups that are not live stop after decoding. checkpointing: 0, or every how many-th layer is recomputed, all
    but its last product, which nothing in backward reads.
    """
    vision, text = shape.vision, shape.text
    live = [group for group in groups if group.live]
    layer, down = 2 * text.matrices, 2 * text.hidden * text.intermediate
    block, last = block_flops(vision)
    embed, mergers = tower_ends(vision)
    twice = 2.5 if executed else 2.0  # attention's backward reads the scores, which a fused kernel recomputes
    layers, blocks = recomputed(text.layers, checkpointing), recomputed(vision.depth, checkpointing)

    def patches(chosen: Iterable[Group]) -> int:
        return sum(group.patches for group in chosen)

    def image_pairs(chosen: Iterable[Group], every: int = 1) -> int:
        return 4 * vision.hidden * sum(vision.pairs(*grid, every) for group in chosen for grid in group.grids)

    def prompt_pairs(chosen: Iterable[Group]) -> int:
        return 4 * text.queries * text.layers * sum(causal_pairs(group.prompt, causal) for group in chosen)

    def row(forward: float, of_live: float, again: float, backward: float) -> dict[str, float]:
        return {
            "forward": forward,
            "recompute": again,
            "backward": backward,
            "reference": of_live if reference else 0,
        }

    through = list(groups) if executed and live else live  # flat groups' prompts ride through the packed backward of the others'
    N, live_N = patches(groups), patches(live)
    P, live_P, through_P = (sum(group.prompt for group in chosen) for chosen in (groups, live, through))
    fed, scored = sum(sum(group.fed) for group in live), sum(sum(group.replies) for group in live)
    trained_N = patches(through) if train_vision else 0
    pixels, pixels_again = (image_pairs(through, every) if train_vision and every else 0 for every in (1, checkpointing))
    own = 4 * text.queries * text.layers * sum(n * group.prompt + causal_pairs(n, causal) for group in live for n in group.fed)
    tower = embed + vision.depth * block + mergers
    head = 2 * scored * text.head_parameters
    table = {
        "vision": row(N * tower, live_N * tower, trained_N * blocks * (block - last), trained_N * (2 * tower - embed)),
        "vision attention": row(image_pairs(groups), image_pairs(live), pixels_again, twice * pixels),
        "prompt": row(
            P * text.layers * layer, live_P * text.layers * layer, through_P * layers * (layer - down), 2 * through_P * text.layers * layer
        ),
        "prompt attention": row(
            prompt_pairs(groups), prompt_pairs(live), prompt_pairs(through) * layers // text.layers, twice * prompt_pairs(through)
        ),
        "replies": row(fed * text.layers * layer, fed * text.layers * layer, fed * layers * (layer - down), 2 * fed * text.layers * layer),
        "reply attention": row(own, own, own * layers // text.layers, twice * own),
        "head": row(head, head, 0, 2 * head),
    }
    if executed:
        table["head"]["recompute"] = head
    return table | decode_flops(shape, groups, executed)


def decode_flops(shape: ModelShape, groups: Sequence[Group], executed: bool) -> Table:
    """FLOPs of sampling, the last three rows of the table. executed: rows go on until the next smaller number of rows holds all that still run.

    A prompt's first logits are computed once for all its replies."""
    text = shape.text
    lengths = [n for group in groups for n in group.replies]
    if executed:
        running = (sum(n > at for n in lengths) for at in range(1, max(lengths, default=1)))
        rows = sum(min(len(lengths), rung(n)) for n in running)
    else:
        rows = sum(n - 1 for n in lengths)
    pairs = sum(n * group.prompt + causal_pairs(n, "exact") for group in groups for n in group.fed)
    return {
        "decode": {"rollout": 2 * text.matrices * text.layers * rows},
        "decode attention": {"rollout": 4 * text.queries * text.layers * pairs},
        "decode head": {"rollout": 2 * text.head_parameters * (len(groups) + rows)},
    }


def repeated_flops(shape: ModelShape, groups: Sequence[Group], *, checkpointing: int, reference: bool) -> Table:
    """The same step by a trainer that runs vision tower and prompt again for every reply in every pass, its sampler's prefill included.

    Old log-probs are taken to be free (aligned sampler and trainer), and flat groups are trained on like any other. This favours it: padding, a
    second pass for old log-probs and what its kernels recompute are not counted.
    """
    one_each = [Group(group.grids, group.prompt, (n,)) for group in groups for n in group.replies]
    table = step_flops(shape, one_each, checkpointing=checkpointing, reference=reference)
    for part in PROMPT_ROWS:
        table[part]["rollout"] = table[part]["forward"]
    return table


def total(table: Table, columns: Iterable[str] = COLUMNS) -> float:
    return sum(passes.get(column, 0) for passes in table.values() for column in columns)


def model_flops(shape: ModelShape, groups: Sequence[Group], *, reference: bool, train_vision: bool = True) -> float:
    """What MFU counts: the floor without any recomputation, vision tower and decoding included, over one microbatch."""
    return total(step_flops(shape, groups, checkpointing=0, reference=reference, train_vision=train_vision))


def rates(flops: float, seconds: float, device: str) -> dict[str, float]:
    """Metrics of `flops` model FLOPs in `seconds`: FLOP/s, and MFU where the device's peak is known."""
    achieved = flops / seconds
    peak = peak_flops(device)
    return {"model_flops_per_s": achieved} | ({} if peak is None else {"mfu": achieved / peak})


def group_cost(shape: ModelShape, grids: Sequence[tuple[int, int]], prompt_tokens: int, reply_tokens: int) -> float:
    """A group's forward pass in language-token equivalents, for packing: the FLOPs of its vision tower, prompt and replies over those of one
    token's language layers without attention.

    grids: (rows, columns) of patches; reply_tokens: of all its replies together. The replies' attention to themselves, which is short, is left out.
    """
    vision, text = shape.vision, shape.text
    tower = sum(h * w for h, w in grids) * (vision.depth * block_flops(vision)[0] + sum(tower_ends(vision)))
    pixels = 4 * vision.hidden * sum(vision.pairs(*grid) for grid in grids)
    pairs = causal_pairs(prompt_tokens, "exact") + reply_tokens * prompt_tokens
    return prompt_tokens + reply_tokens + (tower + pixels + 4 * text.queries * text.layers * pairs) / (2 * text.matrices * text.layers)
