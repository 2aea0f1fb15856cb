"""The public box reader and box reward: two registered operators, so that both survive `torch.compile`; the
reference on CPU, the kernel on CUDA.

Legend: R reply rows, L tokens a row, V vocabulary rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from locus_kernels.box_reward import reference
from locus_kernels.box_reward.records import BoxReading, BoxReward, Scoring
from locus_kernels.box_reward.shapes import REWARD_SHAPES
from locus_kernels.box_reward.table import TokenTable
from locus_kernels.dispatch import implementation


# -------------------------------------------------------------------------------------------------- operators
def _used(ids: Tensor, lengths: Tensor) -> Tensor:
    """On the CPU the work is the longest reply's, not that of its buffer; elsewhere nobody waits for a
    length."""
    return ids[:, : max([0, *lengths.tolist()])] if ids.device.type == "cpu" else ids


@torch.library.custom_op("locus_kernels::read_boxes", mutates_args=())
def _read_operator(
    ids: Tensor, lengths: Tensor, table: list[Tensor], width: int, which: str, grammar: str
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (_used(ids, lengths), lengths, TokenTable.of(table, width))
    return tuple(implementation(reference, ids).read_boxes(*inputs, which=which, grammar=grammar))


@_read_operator.register_fake
def _read_shapes(ids: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = ids.shape[0]
    valid, format_ok = (ids.new_empty(rows, dtype=torch.bool) for _ in range(2))
    return ids.new_empty(rows, 4, dtype=torch.float32), valid, format_ok


@torch.library.custom_op("locus_kernels::box_reward", mutates_args=())
def _reward_operator(
    ids: Tensor,
    lengths: Tensor,
    table: list[Tensor],
    width: int,
    target_boxes: Tensor,
    group_size: int,
    shape: str,
    format_weight: float,
    normalize_std: bool,
    progress: float,
    which: str,
    grammar: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (_used(ids, lengths), lengths, TokenTable.of(table, width), target_boxes)
    scoring = Scoring(group_size, shape, format_weight, normalize_std, progress)
    run = implementation(reference, ids).box_reward
    return tuple(run(*inputs, scoring, which=which, grammar=grammar))


@_reward_operator.register_fake
def _reward_shapes(
    ids: Tensor, lengths: Tensor, table: list[Tensor], width: int, target: Tensor, group_size: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = ids.shape[0]
    iou, reward, advantage = (ids.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return *_read_shapes(ids), iou, reward, advantage, ids.new_empty(rows // group_size, dtype=torch.bool)


# ----------------------------------------------------------------------------------------------------- checks
def _check_reading(ids: Tensor, lengths: Tensor, table: TokenTable, which: str, grammar: str) -> None:
    for name, tensor in (("ids", ids), ("lengths", lengths)):
        if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(f"{name}: expected an integer tensor, got {tensor.dtype}")
        if tensor.device != table.offsets.device:
            raise ValueError(
                f"{name}: expected the token table's device {table.offsets.device}, got {tensor.device}"
            )
    if ids.ndim != 2 or lengths.shape != ids.shape[:1]:
        raise ValueError(
            f"expected ids [rows, tokens] and lengths [rows], got {list(ids.shape)} and {list(lengths.shape)}"
        )
    if which not in reference.WHICH:
        raise ValueError(f"which: expected one of {list(reference.WHICH)}, got {which!r}")
    if grammar not in reference.GRAMMARS:
        raise ValueError(f"grammar: expected one of {list(reference.GRAMMARS)}, got {grammar!r}")


def _check_scoring(ids: Tensor, target_boxes: Tensor, scoring: Scoring) -> None:
    shape, format_weight, progress = scoring.shape, scoring.format_weight, scoring.progress
    if shape not in REWARD_SHAPES:
        raise ValueError(f"shape: expected one of {list(REWARD_SHAPES)}, got {shape!r}")
    if not 0 <= format_weight <= 1 or not 0 <= progress <= 1:
        raise ValueError(f"expected format_weight and progress in [0, 1], got {format_weight} and {progress}")
    if target_boxes.dtype != torch.float32 or target_boxes.shape != (*ids.shape[:1], 4):
        got = f"{target_boxes.dtype} {list(target_boxes.shape)}"
        raise ValueError(f"target_boxes: expected float32 {[*ids.shape[:1], 4]}, got {got}")
    if target_boxes.device != ids.device:
        raise ValueError(f"target_boxes: expected the device of ids, {ids.device}, got {target_boxes.device}")
    reference.check_groups(ids.shape[0], scoring.group_size)


def _check_vocabulary(table: TokenTable, vocab_size: int | None) -> None:
    if vocab_size is not None and vocab_size != table.vocab_size:
        expected = f"one for a vocabulary of {vocab_size} ids, got one for {table.vocab_size}"
        raise ValueError(f"table: expected {expected}: build it with that vocab_size")


def _check_values(ids: Tensor, lengths: Tensor, table: TokenTable) -> None:
    """Reads both tensors, and so waits for their device."""
    ids, lengths = ids.long(), lengths.long()  # unsigned types compare with nothing
    if bool(((lengths < 0) | (lengths > ids.shape[1])).any()):
        raise ValueError(f"lengths: expected values in [0, {ids.shape[1]}], got {lengths.tolist()}")
    counted = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    wrong = counted & ((ids < 0) | (ids >= table.vocab_size))
    if bool(wrong.any()):
        raise ValueError(
            f"ids: expected values in [0, {table.vocab_size}), got {ids[wrong].unique().tolist()}"
        )


# ----------------------------------------------------------------------------------------------------- public
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
      as does a length outside [0, L]; that check waits for the device, and nothing else here does.
    On CUDA this is one launch, which a CUDA graph can capture.
    Raises ValueError for a wrong dtype, shape or device, or an unknown which or grammar.
    """
    _check_reading(ids, lengths, table, which, grammar)
    _check_vocabulary(table, vocab_size)
    if validate:
        _check_values(ids, lengths, table)
    return BoxReading(*_read_operator(ids, lengths, *table.parts(), which, grammar))


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
    scoring = Scoring(group_size, shape, format_weight, normalize_std, progress)
    _check_scoring(ids, target_boxes, scoring)
    _check_reading(ids, lengths, table, which, grammar)
    _check_vocabulary(table, vocab_size)
    if validate:
        _check_values(ids, lengths, table)
    inputs = (ids, lengths, *table.parts(), target_boxes.detach())
    return BoxReward(*_reward_operator(*inputs, *scoring, which, grammar))
