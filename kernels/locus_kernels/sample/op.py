"""The public sampler: one registered operator, so that it survives `torch.compile`; the reference on CPU, the
kernels on CUDA.

Legend: R rows, V vocabulary ids.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from locus_kernels.dispatch import implementation
from locus_kernels.sample import reference
from locus_kernels.sample.reference import Distribution, Place


# --------------------------------------------------------------------------------------------------- operator
@torch.library.custom_op("locus_kernels::sample", mutates_args=())
def _operator(
    logits: Tensor,
    seed: int,
    row: Tensor,
    positions: Tensor | None,
    position: int,
    temperature: float,
    top_p: float,
    top_k: int,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    place = Place(seed, row, position if positions is None else positions)
    distribution = Distribution(temperature, top_p, top_k, allowed)
    return implementation(reference, logits).sample(logits, place, distribution)


@_operator.register_fake
def _shapes(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)


# ----------------------------------------------------------------------------------------------------- public
def _check(logits: Tensor, place: Place, distribution: Distribution) -> None:
    _, row, position = place
    temperature, top_p, top_k, allowed = distribution
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if logits.ndim != 2 or logits.shape[1] < 1 or logits.dtype not in floats:
        expected = "float32, bfloat16 or float16 [rows, vocabulary >= 1]"
        raise ValueError(f"logits: expected {expected}, got {logits.dtype} {list(logits.shape)}")
    rows, vocab = logits.shape
    if row.dtype != torch.int64 or row.shape != (rows,):
        raise ValueError(f"row: expected int64 [{rows}], got {row.dtype} {list(row.shape)}")
    if isinstance(position, Tensor):
        shapes = [torch.Size(shape) for shape in ((rows,), (1,), ())]
        if position.dtype != torch.int64 or position.shape not in shapes:
            expected = f"a number, or int64 [{rows}], [1] or []"
            raise ValueError(f"position: expected {expected}, got {position.dtype} {list(position.shape)}")
    if allowed is not None and (allowed.dtype != torch.bool or allowed.shape != (vocab,)):
        raise ValueError(f"allowed: expected bool [{vocab}], got {allowed.dtype} {list(allowed.shape)}")
    for name, tensor in (("row", row), ("position", position), ("allowed", allowed)):
        if isinstance(tensor, Tensor) and tensor.device != logits.device:
            raise ValueError(f"{name}: expected the device of logits, {logits.device}, got {tensor.device}")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or top_k < 0:
        got = f"{temperature}, {top_p} and {top_k}"
        raise ValueError(f"expected 0 <= temperature, 0 < top_p <= 1 and 0 <= top_k, got {got}")


def _check_values(logits: Tensor, allowed: Tensor | None) -> None:
    scores = logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)
    numbers = not bool((logits.isnan() | (logits == torch.inf)).any())
    if not numbers or not bool((scores > -torch.inf).any(-1).all()):
        expected = "no NaN, no inf, and in each row an allowed id above -inf"
        raise ValueError(f"logits: expected {expected}, got a row without")


def sample(
    logits: Tensor,
    *,
    seed: int,
    row: Tensor,
    position: Tensor | int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    allowed: Tensor | None = None,
    top_k: int = 0,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability: (ids int64 [R], log-prob float32 [R]).

    - logits, float32, bfloat16 or float16 [R, V], any strides; read as float32. -inf is a token that is never
      drawn.
    - seed, row, position: the draw of a row is a function of its logits and of these three alone: neither the
      rows beside it nor their number matter. row, int64 [R], is each row's identity within the seed; position
      is a number, or int64 [R], [1] or [] on the device (for a CUDA graph).
    - temperature: logits are divided by it; 0 is greedy, the first of the most probable ids.
    - allowed, bool [V]: the ids that may be drawn; None for all.
    - top_k: keep the k most probable allowed ids (0: all); then top_p: keep the fewest of these, most
      probable first, that hold that share of their mass. Ids exactly as probable as the last one kept are
      kept too.
    - The log-prob is the full softmax's at this temperature (at 1 for greedy), before `allowed`, top_k and
      top_p cut it, which is what the training forward computes for the same token.
    A row without an allowed id above -inf, or with NaN or +inf, has no distribution: it draws some id in [0,
    V). With validate=True such a row raises ValueError; that check waits for the device, and nothing else
    here does.
    On CUDA: two launches and one read of the logits; top_k or top_p adds a launch that reads a row eight
    times or more. There is no gradient.
    Raises ValueError for a wrong dtype, shape or device, or a parameter out of range.
    """
    distribution = Distribution(float(temperature), float(top_p), top_k, allowed)
    place = Place(reference.wrap(seed), row, position)
    _check(logits, place, distribution)
    if validate:
        _check_values(logits, allowed)
    positions, number = (position, 0) if isinstance(position, Tensor) else (None, reference.wrap(position))
    return _operator(logits.detach(), place.seed, row, positions, number, *distribution)
