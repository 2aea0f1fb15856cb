"""8-bit AdamW as one Triton kernel over all parameters of a kind, whatever their number and sizes.

A program takes 4 blocks of 256 elements of one parameter, finds which in a table of jobs, and does what
`reference.step` does: one read of weight, gradient and state, one write of weight and state. Rates, the gradient's
scale and the bias corrections are read on the device. Parameters without blocks run the same kernel with float32
moments. The table is two small tensors, sent without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from locus_kernels.adamw8bit import reference

BLOCK = tl.constexpr(reference.BLOCK)
STEPS, LARGEST, NARROW = (tl.constexpr(n) for n in (reference.STEPS, reference.LARGEST, reference.NARROW))
HASH_A, HASH_B = (tl.constexpr(n - 2**32 if n >= 2**31 else n) for n in (reference.HASH_A, reference.HASH_B))
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
ROWS = 4  # blocks a program
# Fields of a job, int64 each: addresses, elements, first program, the two words of its random bits
VALUE, SLOPE, RATE, PARTS, SCALE, CODES, LOW, HIGH, COUNT, FIRST, WORD_A, WORD_B = (tl.constexpr(n) for n in range(12))
JOB = tl.constexpr(12)


@triton.jit
def _random_bits(element, word_a, word_b):
    """int32 bit patterns, as `reference.random_bits`; products wrap around, and shifts are logical."""
    x = element.to(tl.int32) ^ word_a
    x = (x ^ ((x >> 16) & 0xFFFF)) * HASH_A
    x = (x ^ ((x >> 15) & 0x1FFFF)) * HASH_B
    x = (x ^ ((x >> 16) & 0xFFFF)) ^ word_b
    x = (x ^ ((x >> 16) & 0xFFFF)) * HASH_A
    x = (x ^ ((x >> 15) & 0x1FFFF)) * HASH_B
    return (x ^ ((x >> 16) & 0xFFFF)) ^ word_a


@triton.jit
def _spacing(low, high):
    ratio = tl.where(low > 0, high / tl.where(low > 0, low, 1.0), 1.0)
    return tl.maximum(tl.log2(ratio) / STEPS, 9.094947017729282e-13)  # 2**-40


@triton.jit
def _pointer(job, FIELD: tl.constexpr, kind: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a field of the job, as a pointer."""
    pointer = tl.load(job + FIELD).to(tl.pointer_type(kind))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def adamw8bit_kernel(
    jobs, corrections, gradient_scale, jobs_count, beta1, beta2, eps, weight_decay,
    VALUES: tl.constexpr, SLOPES: tl.constexpr, EIGHT_BIT: tl.constexpr, ALIGNED: tl.constexpr,
    SEARCH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """VALUES, SLOPES: types of weights and gradients. SEARCH: steps of the search among the jobs."""
    program = tl.program_id(0)
    number, beyond = 0, jobs_count
    for _ in tl.static_range(SEARCH):  # the last job whose first program is not past this one
        middle = (number + beyond) // 2
        ours = tl.load(jobs + tl.minimum(middle, jobs_count - 1) * JOB + FIRST) <= program
        ours = ours & (middle < jobs_count)
        number, beyond = tl.where(ours, middle, number), tl.where(ours, beyond, middle)
    job = jobs + number * JOB
    block = (program - tl.load(job + FIRST)) * ROWS + tl.arange(0, ROWS)
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = element < tl.load(job + COUNT)
    there = block * BLOCK < tl.load(job + COUNT)
    scale, rate = tl.load(gradient_scale), tl.load(tl.load(job + RATE).to(tl.pointer_type(tl.float32)))
    values = _pointer(job, VALUE, VALUES, ALIGNED) + element
    slope = tl.load(_pointer(job, SLOPE, SLOPES, ALIGNED) + element, mask=inside, other=0.0).to(tl.float32)
    slope = tl.where(scale == 0, 0.0, slope * scale)
    if EIGHT_BIT:
        parts = _pointer(job, PARTS, tl.int8, ALIGNED) + element
        codes = _pointer(job, CODES, tl.uint8, ALIGNED) + element
        scales, lows, highs = (
            _pointer(job, SCALE, tl.float32, False) + block,
            _pointer(job, LOW, tl.float32, False) + block,
            _pointer(job, HIGH, tl.float32, False) + block,
        )
        low, high = tl.load(lows, mask=there, other=0.0)[:, None], tl.load(highs, mask=there, other=0.0)[:, None]
        code = tl.load(codes, mask=inside, other=0).to(tl.float32)
        root = tl.where(code > 0, low * tl.exp2((code - 1) * _spacing(low, high)), 0.0)
        share = tl.load(scales, mask=there, other=0.0)[:, None] / LARGEST
        exp_avg = tl.load(parts, mask=inside, other=0).to(tl.float32) * share * root
        exp_avg_sq = root * root
    else:
        firsts = _pointer(job, PARTS, tl.float32, ALIGNED) + element
        seconds = _pointer(job, CODES, tl.float32, ALIGNED) + element
        exp_avg = tl.load(firsts, mask=inside, other=0.0)
        exp_avg_sq = tl.load(seconds, mask=inside, other=0.0)
    exp_avg = exp_avg * beta1 + slope * (1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + slope * slope * (1 - beta2)
    root = tl.sqrt(exp_avg_sq)
    first, second = tl.load(corrections + 2 * number), tl.load(corrections + 2 * number + 1)
    value = tl.load(values, mask=inside, other=0.0).to(tl.float32) * (1 - rate * weight_decay)
    value -= rate * (exp_avg / first) / (root / tl.sqrt(second) + eps)
    bits = _random_bits(element, tl.load(job + WORD_A).to(tl.int32), tl.load(job + WORD_B).to(tl.int32))
    if values.dtype.element_ty == tl.bfloat16:  # the nearer of two neighbours the likelier
        raised = (value.to(tl.int32, bitcast=True) + (bits & 0xFFFF)) & -65536
        rounded = tl.where(value == value, raised.to(tl.float32, bitcast=True), value)  # NaN stays NaN
        tl.store(values, rounded.to(tl.bfloat16), mask=inside)
    else:
        tl.store(values, value, mask=inside)
    if EIGHT_BIT:
        top = tl.max(root, 1)
        bottom = tl.min(tl.where(root == 0, float("inf"), root), 1)
        bottom = tl.maximum(tl.minimum(bottom, top), top * NARROW)
        low, high = bottom[:, None], top[:, None]
        spacing = _spacing(low, high)
        ratio = tl.maximum(root / tl.where(low > 0, low, 1.0), 1.0)
        below = tl.minimum(tl.floor(tl.log2(ratio) / spacing), STEPS - 1)
        under, over = low * tl.exp2(below * spacing), low * tl.exp2((below + 1) * spacing)
        draw = ((bits >> 16) & 0xFFFF).to(tl.float32) / 65536
        up = draw * (over - under) < root - under
        code = tl.where(root > 0, below + 1 + up.to(tl.float32), 0.0)
        kept = tl.where(code > 0, low * tl.exp2((code - 1) * spacing), 0.0)
        quotient = tl.where(kept > 0, exp_avg / tl.where(kept > 0, kept, 1.0), 0.0)
        scale = tl.max(tl.abs(quotient), 1)
        largest = tl.maximum(scale, TINY)
        stirred = (bits ^ ((bits >> 15) & 0x1FFFF)) * HASH_A  # reference.second_draw
        draw = ((stirred >> 16) & 0xFFFF).to(tl.float32) / 65536
        size = tl.minimum(tl.floor(tl.abs(quotient) * (LARGEST / largest[:, None]) + draw), LARGEST)
        part = tl.where(quotient < 0, -size, size)
        tl.store(codes, code.to(tl.int32).to(tl.uint8), mask=inside)
        tl.store(parts, part.to(tl.int32).to(tl.int8), mask=inside)
        tl.store(scales, scale, mask=there)
        tl.store(lows, bottom, mask=there)
        tl.store(highs, top, mask=there)
    else:
        tl.store(firsts, exp_avg, mask=inside)
        tl.store(seconds, exp_avg_sq, mask=inside)


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def adamw8bit_triton(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    *,
    lr: Sequence[Tensor],
    gradient_scale: Tensor,
    corrections: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    words: Sequence[tuple[int, int]],
    rows: int = ROWS,
) -> None:
    """As `reference.adamw8bit_`; arguments checked by the caller. rows: blocks a program."""
    slopes = [gradient.contiguous() for gradient in gradients]
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, (parameter, slope, state) in enumerate(zip(parameters, slopes, states, strict=True)):
        if parameter.numel():
            kinds.setdefault((parameter.dtype, slope.dtype, "exp_avg" not in state), []).append(i)
    for (value, slope, eight_bit), chosen in kinds.items():
        jobs: list[list[int]] = []
        programs = 0
        for i in chosen:
            names = ("exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_low", "exp_avg_sq_high")
            held = [states[i][name] for name in names] if eight_bit else _unblocked(states[i])
            where = [t.data_ptr() for t in (parameters[i], slopes[i], lr[i], *held)]
            count = parameters[i].numel()
            jobs.append([*where, count, programs, *map(_signed, words[i])])
            programs += triton.cdiv(count, rows * reference.BLOCK)
        aligned = not any(job[field] % 16 for job in jobs for field in (0, 1, 3, 5))
        kept = corrections if len(chosen) == len(parameters) else corrections[_send(torch.tensor(chosen), corrections)]
        adamw8bit_kernel[(programs,)](
            _send(torch.tensor(jobs), corrections), kept.contiguous(), gradient_scale, len(jobs), *betas, eps, weight_decay,
            VALUES=TYPES[value], SLOPES=TYPES[slope], EIGHT_BIT=eight_bit, ALIGNED=aligned,
            SEARCH=len(jobs).bit_length(), ROWS=rows, num_warps=4,
        )  # fmt: skip


def _unblocked(state: dict[str, Tensor]) -> list[Tensor]:
    """The moments in the places of a job's five addresses of states; the others are not read."""
    return [state["exp_avg"], state["exp_avg"], state["exp_avg_sq"], state["exp_avg_sq"], state["exp_avg_sq"]]


def _send(table: Tensor, like: Tensor) -> Tensor:
    """A CPU tensor on the device of another; from pinned memory, so that the host does not wait."""
    return table.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else table
