"""Patchify as two Triton kernels over all images of a call at once, whatever their sizes.

1. `first_kernel` resizes along one axis: source bytes -> bytes, channels last, in one buffer for all images.
2. `second_kernel` resizes that along the other, normalises, and writes each value to its place in its patch,
   once a frame; it writes in order.

Which axis comes first is the reference's choice for each image; below, u is the axis of the first pass and v
that of the second. Rounding to a byte between the passes is part of what is computed, so keeping bytes loses
nothing; they are an eighth of what is written (float32, two frames).
Images are not copied together: a job's pointer and strides say where its pixels lie, so a crop of an image on
the device costs nothing. What a job needs is two small tensors of integers, sent without waiting for the
device; taps are computed once for each pair of lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from locus_kernels.patchify import reference
from locus_kernels.patchify.reference import Box, Size

BITS, HALF = tl.constexpr(reference.FRACTION_BITS), tl.constexpr(reference.HALF)
JOB = tl.constexpr(17)  # fields of a job, int64 each
POINTER, STRIDE_U, STRIDE_V, STRIDE_C = (tl.constexpr(n) for n in range(4))  # where its pixels lie
SOURCE_U, SOURCE_V, OUT_U, OUT_V, FLIP = (
    tl.constexpr(n) for n in range(4, 9)
)  # lengths; FLIP: u is the vertical axis
TAPS_U, COUNT_U, TAPS_V, COUNT_V = (
    tl.constexpr(n) for n in range(9, 13)
)  # where its taps begin, and how many an output pixel has
MIDDLE, PATCH, FIRST, SECOND = (
    tl.constexpr(n) for n in range(13, 17)
)  # its first byte between the passes, patch, programs of either kernel
ROWS, COLUMNS, VALUES = 8, 128, 1024  # the first kernel's tile; values a program of the second


@triton.jit
def _byte(total):
    return tl.minimum(tl.maximum(total >> BITS, 0), 255)


@triton.jit
def first_kernel(jobs, job_of_program, taps, middle, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program resizes ROWS lines of one image along u, COLUMNS values (a third as many pixels) of each."""
    program = tl.program_id(0)
    job = jobs + tl.load(job_of_program + program).to(tl.int64) * JOB
    source_u, source_v, out_u = tl.load(job + SOURCE_U), tl.load(job + SOURCE_V), tl.load(job + OUT_U)
    tile = program - tl.load(job + FIRST).to(tl.int32)
    tiles = tl.cdiv(out_u * 3, COLUMNS).to(tl.int32)
    v = (tile // tiles) * ROWS + tl.arange(0, ROWS)
    column = (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    u, channel = column // 3, column % 3
    inside = u < out_u
    taps_u = taps + tl.load(job + TAPS_U)
    start = tl.load(taps_u + u, mask=inside, other=0)
    source = tl.load(job + POINTER).to(tl.pointer_type(tl.uint8)) + v.to(tl.int64)[:, None] * tl.load(
        job + STRIDE_V
    )
    source += (channel * tl.load(job + STRIDE_C))[None, :]
    stride_u = tl.load(job + STRIDE_U)
    both = (v < source_v)[:, None] & inside[None, :]
    total = tl.full((ROWS, COLUMNS), HALF, tl.int32)
    for k in range(0, tl.load(job + COUNT_U).to(tl.int32)):
        weight = tl.load(taps_u + (k + 1) * out_u + u, mask=inside, other=0)
        at = tl.minimum(start + k, source_u - 1)
        total += tl.load(source + (at * stride_u)[None, :], mask=both, other=0).to(tl.int32) * weight[None, :]
    there = middle + tl.load(job + MIDDLE) + v.to(tl.int64)[:, None] * (out_u * 3) + column[None, :]
    tl.store(there, _byte(total).to(tl.uint8), mask=both)


@triton.jit
def second_kernel(
    jobs, job_of_program, taps, middle, out, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    SIDE: tl.constexpr, FRAMES: tl.constexpr, MERGE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """A program writes VALUES values of one image's patches (of one frame, in the output's order), to every
    frame. Patches are SIDE pixels square."""
    program = tl.program_id(0)
    job = jobs + tl.load(job_of_program + program).to(tl.int64) * JOB
    source_v, out_u, out_v = (
        tl.load(job + SOURCE_V),
        tl.load(job + OUT_U).to(tl.int32),
        tl.load(job + OUT_V).to(tl.int32),
    )
    flip = tl.load(job + FLIP) != 0
    value = (program - tl.load(job + SECOND).to(tl.int32)) * VALUES + tl.arange(0, VALUES)
    inside = value < out_u * out_v * 3
    SQUARE: tl.constexpr = SIDE * SIDE
    patch, rest = value // (3 * SQUARE), value % (3 * SQUARE)
    channel, pixel = rest // SQUARE, rest % SQUARE
    blocks = tl.where(flip, out_v, out_u) // (SIDE * MERGE)
    block, cell = patch // (MERGE * MERGE), patch % (MERGE * MERGE)
    y = ((block // blocks) * MERGE + cell // MERGE) * SIDE + pixel // SIDE
    x = ((block % blocks) * MERGE + cell % MERGE) * SIDE + pixel % SIDE
    u, v = tl.where(flip, y, x), tl.where(flip, x, y)
    taps_v = taps + tl.load(job + TAPS_V)
    start = tl.load(taps_v + v, mask=inside, other=0)
    source = middle + tl.load(job + MIDDLE) + (u * 3 + channel)
    total = tl.full((VALUES,), HALF, tl.int32)
    for k in range(0, tl.load(job + COUNT_V).to(tl.int32)):
        weight = tl.load(taps_v + (k + 1) * out_v + v, mask=inside, other=0)
        at = tl.minimum(start + k, source_v - 1)
        total += tl.load(source + at * (out_u * 3), mask=inside, other=0).to(tl.int32) * weight
    scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
    shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
    normal = _byte(total).to(tl.float32) * scale - shift
    first = out + (tl.load(job + PATCH) + patch) * (3 * FRAMES * SQUARE) + channel * (FRAMES * SQUARE) + pixel
    for frame in tl.static_range(FRAMES):
        tl.store(first + frame * SQUARE, normal.to(out.dtype.element_ty), mask=inside)


def _upload(table: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; from pinned memory, so that the host does not wait."""
    return table.to(device) if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _plan(
    images: Sequence[Tensor],
    sizes: Sequence[Size],
    boxes: Sequence[Box],
    patch: int,
    tile: tuple[int, int, int],
):
    """(jobs int64 [n, JOB]; taps int32 [..]; programs int64 [2, n] of each job in either kernel; bytes
    between the passes), all on the CPU."""
    rows, columns, values = tile
    parts: list[Tensor] = []
    places: dict[tuple[int, int], int] = {}
    used, middle, patches = 0, 0, 0
    jobs, first, second = [], [0], [0]
    for image, size, (x1, y1, x2, y2) in zip(images, sizes, boxes, strict=True):
        stride_y, stride_x, stride_c = image.stride()
        across, down = ((x2 - x1, size[1]), stride_x), ((y2 - y1, size[0]), stride_y)
        flip = reference.columns_first((y2 - y1, x2 - x1), size)
        (pair_u, stride_u), (pair_v, stride_v) = (down, across) if flip else (across, down)
        for pair in (pair_u, pair_v):
            if pair not in places:
                places[pair] = used
                parts += [reference.taps(*pair).start, reference.taps(*pair).weight.flatten()]
                used += len(parts[-2]) + len(parts[-1])
        where = [image.data_ptr() + y1 * stride_y + x1 * stride_x, stride_u, stride_v, stride_c]
        by_axis = [
            number
            for pair in (pair_u, pair_v)
            for number in (places[pair], len(reference.taps(*pair).weight))
        ]
        jobs.append(
            [
                *where,
                pair_u[0],
                pair_v[0],
                pair_u[1],
                pair_v[1],
                flip,
                *by_axis,
                middle,
                patches,
                first[-1],
                second[-1],
            ]
        )
        middle += pair_v[0] * pair_u[1] * 3
        patches += size[0] * size[1] // patch**2
        first.append(first[-1] + triton.cdiv(pair_v[0], rows) * triton.cdiv(pair_u[1] * 3, columns))
        second.append(second[-1] + triton.cdiv(size[0] * size[1] * 3, values))
    return torch.tensor(jobs), torch.cat(parts), torch.tensor([first, second]).diff(), middle


def patchify_images_triton(
    images: Sequence[Tensor],
    sizes: Sequence[Size],
    boxes: Sequence[Box],
    *,
    patch: int,
    frames: int,
    merge: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    tile: tuple[int, int, int] = (ROWS, COLUMNS, VALUES),
) -> Tensor:
    """`reference.patchify_images` in two launches; arguments as there, checked by the caller. `tile`: ROWS,
    COLUMNS and VALUES of the kernels."""
    device = images[0].device
    jobs, taps, programs, between = _plan(images, sizes, boxes, patch, tile)
    first, second = (int(n) for n in programs.sum(1))
    job = torch.arange(len(images)).repeat(2).repeat_interleave(programs.flatten())
    sent, taps = _upload(torch.cat([jobs.flatten(), job]), device), _upload(taps, device)
    job = sent[jobs.numel() :]
    middle = torch.empty(between, dtype=torch.uint8, device=device)
    out = torch.empty(
        sum(reference.count_patches(sizes, patch)), 3 * frames * patch**2, dtype=dtype, device=device
    )
    scale, shift = reference.normalization(mean, std)
    first_kernel[(first,)](sent, job, taps, middle, ROWS=tile[0], COLUMNS=tile[1])
    second_kernel[(second,)](
        sent,
        job[first:],
        taps,
        middle,
        out,
        *scale,
        *shift,
        SIDE=patch,
        FRAMES=frames,
        MERGE=merge,
        VALUES=tile[2],
        enable_fp_fusion=False,
    )
    return out
