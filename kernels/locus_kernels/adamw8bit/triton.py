"""8-bit AdamW as one Triton kernel over all parameters of a kind, whatever their number and sizes.

A program takes 4 blocks of 256 elements of one parameter, finds which in a table of jobs, and does what
`reference.step` does: one read of weight, gradient and state, one write of weight and state. Rates, the
gradient's scale and the bias corrections are read on the device. Parameters without blocks run the same
kernel with float32 moments. The table is sent without waiting for the device.

Legend: a job is one parameter; [ROWS, BLOCK] elements a program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from locus_kernels.adamw8bit import reference
from locus_kernels.adamw8bit.reference import Scalars, Settings, State
from locus_kernels.launch import fields
from locus_kernels.transfer import send

BLOCK = tl.constexpr(reference.BLOCK)
STEPS, LARGEST, NARROW = (tl.constexpr(n) for n in (reference.STEPS, reference.LARGEST, reference.NARROW))
HASH_A, HASH_B = (tl.constexpr(n - 2**32 if n >= 2**31 else n) for n in (reference.HASH_A, reference.HASH_B))
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
ROWS = 4  # blocks a program
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


class Job(NamedTuple):
    """What the kernel knows of a parameter; int64 each, the first eight addresses."""

    value: int
    slope: int  # its gradient
    rate: int
    parts: int  # exp_avg_codes, or exp_avg
    scale: int  # exp_avg_scale
    codes: int  # exp_avg_sq_codes, or exp_avg_sq
    low: int  # exp_avg_sq_low
    high: int  # exp_avg_sq_high
    elements: int
    first: int  # its first program
    word_a: int  # two words of 32 bits, signed, from which its random bits follow
    word_b: int


JOB = tl.constexpr(len(Job._fields))
VALUE, SLOPE, RATE = fields(Job, "value slope rate")
PARTS, SCALE, CODES, LOW, HIGH = fields(Job, "parts scale codes low high")
ELEMENTS, FIRST, WORD_A, WORD_B = fields(Job, "elements first word_a word_b")


# ----------------------------------------------------------------------------------------------------- kernel
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
def _find(jobs, jobs_count, program, SEARCH: tl.constexpr):
    """The last job whose first program is not past this one, in SEARCH steps."""
    number, beyond = 0, jobs_count
    for _ in tl.static_range(SEARCH):
        middle = (number + beyond) // 2
        ours = tl.load(jobs + tl.minimum(middle, jobs_count - 1) * JOB + FIRST) <= program
        ours = ours & (middle < jobs_count)
        number, beyond = tl.where(ours, middle, number), tl.where(ours, beyond, middle)
    return number


@triton.jit
def _read_blocks(parts, codes, scales, lows, highs, inside, there):
    """(exp_avg, exp_avg_sq), float32 [ROWS, BLOCK], of 8-bit moments."""
    low, high = tl.load(lows, mask=there, other=0.0)[:, None], tl.load(highs, mask=there, other=0.0)[:, None]
    code = tl.load(codes, mask=inside, other=0).to(tl.float32)
    root = tl.where(code > 0, low * tl.exp2((code - 1) * _spacing(low, high)), 0.0)
    share = tl.load(scales, mask=there, other=0.0)[:, None] / LARGEST
    return tl.load(parts, mask=inside, other=0).to(tl.float32) * share * root, root * root


@triton.jit
def _write_blocks(parts, codes, scales, lows, highs, inside, there, exp_avg, root, bits):
    """`reference.quantize` with the draws of `reference._store`."""
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


@triton.jit
def adamw8bit_kernel(
    jobs, corrections, gradient_scale, jobs_count, beta1, beta2, eps, weight_decay,
    VALUES: tl.constexpr, SLOPES: tl.constexpr, EIGHT_BIT: tl.constexpr, ALIGNED: tl.constexpr,
    SEARCH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """VALUES, SLOPES: types of weights and gradients. SEARCH: steps of the search among the jobs."""
    program = tl.program_id(0)
    number = _find(jobs, jobs_count, program, SEARCH)
    job = jobs + number * JOB
    block = (program - tl.load(job + FIRST)) * ROWS + tl.arange(0, ROWS)
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = element < tl.load(job + ELEMENTS)
    there = block * BLOCK < tl.load(job + ELEMENTS)
    scale, rate = tl.load(gradient_scale), tl.load(tl.load(job + RATE).to(tl.pointer_type(tl.float32)))
    values = _pointer(job, VALUE, VALUES, ALIGNED) + element
    slope = tl.load(_pointer(job, SLOPE, SLOPES, ALIGNED) + element, mask=inside, other=0.0).to(tl.float32)
    slope = tl.where(scale == 0, 0.0, slope * scale)
    if EIGHT_BIT:
        parts = _pointer(job, PARTS, tl.int8, ALIGNED) + element
        codes = _pointer(job, CODES, tl.uint8, ALIGNED) + element
        scales = _pointer(job, SCALE, tl.float32, False) + block
        lows = _pointer(job, LOW, tl.float32, False) + block
        highs = _pointer(job, HIGH, tl.float32, False) + block
        exp_avg, exp_avg_sq = _read_blocks(parts, codes, scales, lows, highs, inside, there)
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
        _write_blocks(parts, codes, scales, lows, highs, inside, there, exp_avg, root, bits)
    else:
        tl.store(firsts, exp_avg, mask=inside)
        tl.store(seconds, exp_avg_sq, mask=inside)


# --------------------------------------------------------------------------------------------------- launcher
def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _addresses(state: State) -> list[int]:
    """The five addresses of a job's state; without blocks only those of parts and codes are read."""
    if "exp_avg" in state:
        names = ("exp_avg", "exp_avg", "exp_avg_sq", "exp_avg_sq", "exp_avg_sq")
    else:
        names = ("exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_low", "exp_avg_sq_high")
    return [state[name].data_ptr() for name in names]


def adamw8bit_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    scalars: Scalars,
    settings: Settings,
    words: Sequence[tuple[int, int]],
    *,
    rows: int = ROWS,
) -> None:
    """As `reference.adamw8bit_`; arguments checked by the caller. rows: blocks a program."""
    slopes = [gradient.contiguous() for gradient in gradients]
    kinds: dict[tuple[torch.dtype, torch.dtype, bool], list[int]] = {}
    for i, (parameter, slope, state) in enumerate(zip(parameters, slopes, states, strict=True)):
        if parameter.numel():
            kinds.setdefault((parameter.dtype, slope.dtype, "exp_avg" not in state), []).append(i)
    corrections = scalars.corrections
    for (value, slope_type, eight_bit), chosen in kinds.items():
        jobs: list[Job] = []
        programs = 0
        for i in chosen:
            addresses = [t.data_ptr() for t in (parameters[i], slopes[i], scalars.lr[i])]
            addresses += _addresses(states[i])
            elements = parameters[i].numel()
            jobs.append(Job._make([*addresses, elements, programs, *map(_signed, words[i])]))
            programs += triton.cdiv(elements, rows * reference.BLOCK)
        wide = [address for job in jobs for address in (job.value, job.slope, job.parts, job.codes)]
        kept = corrections
        if len(chosen) < len(parameters):
            kept = corrections[send(torch.tensor(chosen), corrections.device)]
        adamw8bit_kernel[(programs,)](
            send(torch.tensor(jobs), corrections.device), kept.contiguous(), scalars.gradient_scale,
            len(jobs), *settings, VALUES=TYPES[value], SLOPES=TYPES[slope_type], EIGHT_BIT=eight_bit,
            ALIGNED=not any(address % 16 for address in wide),
            SEARCH=len(jobs).bit_length(), ROWS=rows, num_warps=4,
        )  # fmt: skip
