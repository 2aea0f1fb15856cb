"""The public box reader and box reward: one registered operator, so that both survive `torch.compile`; the
reference on CPU, the kernel on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from locus_kernels.box_reward import reference
from locus_kernels.box_reward.reference import BoxReading, BoxReward
from locus_kernels.box_reward.table import TokenTable


@torch.library.custom_op("locus_kernels::box_reward", mutates_args=(), device_types="cpu")
def _operator(
    ids: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    classes: Tensor,
    transitions: Tensor,
    final: Tensor,
    width: int,
    target_boxes: Tensor | None,
    group_size: int,
    which: str,
    grammar: str,
    shape: str,
    format_weight: float,
    normalize_std: bool,
    progress: float,
) -> list[Tensor]:
    table = TokenTable(offsets, classes, transitions, final, width)
    ids = ids[:, : max([0, *lengths.tolist()])]  # the work is the longest reply's, not that of its buffer
    if target_boxes is None:
        return list(reference.read_boxes(ids, lengths, table, which=which, grammar=grammar))
    choices = {"which": which, "grammar": grammar, "shape": shape}
    weights = {"format_weight": format_weight, "normalize_std": normalize_std, "progress": progress}
    return list(reference.box_reward(ids, lengths, table, target_boxes, group_size, **choices, **weights))  # type: ignore[arg-type]


@_operator.register_kernel("cuda")
def _on_cuda(
    ids,
    lengths,
    offsets,
    classes,
    transitions,
    final,
    width,
    target_boxes,
    group_size,
    which,
    grammar,
    shape,
    format_weight,
    normalize_std,
    progress,
):
    from locus_kernels.box_reward import triton as kernel  # only here: a machine without CUDA needs no Triton

    table = TokenTable(offsets, classes, transitions, final, width)
    if target_boxes is None:
        return list(kernel.read_boxes_triton(ids, lengths, table, which=which, grammar=grammar))
    choices = {"which": which, "grammar": grammar, "shape": shape}
    weights = {"format_weight": format_weight, "normalize_std": normalize_std, "progress": progress}
    return list(kernel.box_reward_triton(ids, lengths, table, target_boxes, group_size, **choices, **weights))


@_operator.register_fake
def _shapes(ids, lengths, offsets, classes, transitions, final, width, target_boxes, group_size, *_):
    rows = ids.shape[0]
    flags = [ids.new_empty(rows, dtype=torch.bool) for _ in range(2)]
    reading = [ids.new_empty(rows, 4, dtype=torch.float32), *flags]
    if target_boxes is None:
        return reading
    return [
        *reading,
        *(ids.new_empty(rows, dtype=torch.float32) for _ in range(3)),
        ids.new_empty(rows // group_size, dtype=torch.bool),
    ]


def read_boxes(
    ids: Tensor,
    lengths: Tensor,
    table: TokenTable,
    *,
    which: str = "answer",
    grammar: str = "think_answer",
    vocab_size: int | None = None,
    validate: bool = False,
) -> BoxReading:
    """Read a box out of each reply: as decoding the tokens and searching the text with a regular expression
    would, without any text.

    ids, integer [R, L]: token ids, any strides; lengths, integer [R]: how many of a row's tokens count (more
    than L counts as L, less than 0 as 0). The text is what decoding without special tokens gives; white space
    is ASCII's six. A box is `[` number `,` number `,` number `,` number `]` with white space anywhere around
    the numbers, a number `[+-]?` digits, perhaps `.` digits. Boxes are found from left to right and do not
    overlap.
    - which: the "first" or the "last" box of the reply, or ("answer") the first one inside the first
      `<answer>` ... `</answer>`; without the closing tag there is none.
    - grammar: what `format_ok` asks of the whole reply. "think_answer": `<think>` any `</think>` `<answer>`
      any `</answer>`, with white space allowed before, after, and between `</think>` and `<answer>`;
      "direct": one box with white space around.
    - Numbers are cut, not rounded, after the sixth digit behind the point; a magnitude above 1,000,000 then
      makes the box read as none.
    - valid compares the float32 coordinates returned. Nothing is clamped to an image.
    - vocab_size: how many ids the model can produce (the rows of its head). Given, it must be the table's: a
      table of another vocabulary raises.
    - An id outside [0, V) counts as one character that fits nowhere. With validate=True it raises ValueError,
      as does a length outside [0, L];
      that check waits for the device, and nothing else here does.
    On CUDA this is one launch, which a CUDA graph can capture. Raises ValueError for a wrong dtype, shape or
    device, or an unknown which or grammar.
    """
    reference.check_reading(ids, lengths, table, which, grammar, vocab_size, validate)
    if ids.is_meta:
        return reference.read_boxes(ids, lengths, table, which=which, grammar=grammar)
    parts = (table.offsets, table.classes, table.transitions, table.final, table.width)
    return BoxReading(*_operator(ids, lengths, *parts, None, 1, which, grammar, "iou", 0.0, False, 0.0))


def box_reward(
    ids: Tensor,
    lengths: Tensor,
    table: TokenTable,
    target_boxes: Tensor,
    group_size: int,
    *,
    which: str = "answer",
    grammar: str = "think_answer",
    shape: str = "iou",
    format_weight: float = 0.1,
    normalize_std: bool = True,
    progress: float = 0.0,
    vocab_size: int | None = None,
    validate: bool = False,
) -> BoxReward:
    """Token ids in, rewards and group advantages out.

    reward = (1 - format_weight) * shape + format_weight * format, where the shape (a name in `REWARD_SHAPES`)
    is 0 for a box that is not valid; advantage = `group_advantage(reward, group_size, normalize_std)`.
    target_boxes, float32 [R, 4], one a row and in the frame that the model speaks: see `iou` for why no
    conversion is needed. ids, lengths, which, grammar, vocab_size and validate are as in `read_boxes`;
    progress, in [0, 1], is the share of training done.
    On CUDA this is one launch, without waiting for the device, which a CUDA graph can capture; a group may
    there have at most 512 replies.
    Raises ValueError for a wrong dtype, shape or device, for rows that are not whole groups, and for an
    unknown name or a value out of range.
    """
    reference.check_reward(ids, target_boxes, group_size, shape, format_weight, progress)
    reference.check_reading(ids, lengths, table, which, grammar, vocab_size, validate)
    choices = (which, grammar, shape)
    if ids.is_meta:
        names = dict(zip(("which", "grammar", "shape"), choices, strict=True))
        weights = {"format_weight": format_weight, "normalize_std": normalize_std, "progress": progress}
        return reference.box_reward(ids, lengths, table, target_boxes, group_size, **names, **weights)  # type: ignore[arg-type]
    parts = (table.offsets, table.classes, table.transitions, table.final, table.width)
    return BoxReward(
        *_operator(
            ids,
            lengths,
            *parts,
            target_boxes.detach(),
            group_size,
            *choices,
            format_weight,
            normalize_std,
            progress,
        )
    )
