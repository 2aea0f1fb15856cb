"""Patchify as two Triton kernels over all images of a call at once, whatever their sizes.

1. `first_kernel` resizes along one axis: source bytes -> bytes, channels last, in one buffer for all images.
2. `second_kernel` resizes that along the other, normalises, and writes each value to its place in its patch,
   once a frame; it writes in order.

Which axis comes first is the reference's choice for each image. Rounding to a byte between the passes is part
of what is computed, so keeping bytes loses nothing; they are an eighth of what is written (float32, two
frames).
Images are not copied together: a job's pointer and strides say where its pixels lie, so a crop of an image on
the device costs nothing. What a job needs is two small tensors of integers, sent without waiting for the
device; taps are computed once for each pair of lengths.

Legend: u the axis of the first pass, v that of the second; a job is one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from locus_kernels.launch import fields
from locus_kernels.patchify import reference
from locus_kernels.patchify.reference import Box, Layout, Size
from locus_kernels.transfer import send


class Job(NamedTuple):
    """What the kernels know of an image; int64 each. Counts are of values where not said otherwise."""

    pointer: int  # address of its first pixel
    stride_u: int  # bytes from a pixel to the next
    stride_v: int
    stride_c: int  # bytes from a channel to the next
    source_u: int  # pixels
    source_v: int
    out_u: int  # pixels
    out_v: int
    flip: bool  # u is the vertical axis
    taps_u: int  # where its taps begin
    count_u: int  # taps of an output pixel
    taps_v: int
    count_v: int
    middle: int  # its first byte between the passes
    patch: int  # its first patch
    first: int  # its first program of the first kernel
    second: int  # its first program of the second kernel


class Tile(NamedTuple):
    """The work of a program."""

    rows: int  # lines of the first kernel
    columns: int  # values of a line
    values: int  # of the second kernel


JOB = tl.constexpr(len(Job._fields))
POINTER, STRIDE_U, STRIDE_V, STRIDE_C = fields(Job, "pointer stride_u stride_v stride_c")
SOURCE_U, SOURCE_V, OUT_U, OUT_V, FLIP = fields(Job, "source_u source_v out_u out_v flip")
TAPS_U, COUNT_U, TAPS_V, COUNT_V = fields(Job, "taps_u count_u taps_v count_v")
MIDDLE, PATCH, FIRST, SECOND = fields(Job, "middle patch first second")
BITS, HALF = tl.constexpr(reference.FRACTION_BITS), tl.constexpr(reference.HALF)
TILE = Tile(rows=8, columns=128, values=1024)


# ---------------------------------------------------------------------------------------------------- kernels
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
    source = tl.load(job + POINTER).to(tl.pointer_type(tl.uint8))
    source = source + v.to(tl.int64)[:, None] * tl.load(job + STRIDE_V)
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
    source_v = tl.load(job + SOURCE_V)
    out_u, out_v = tl.load(job + OUT_U).to(tl.int32), tl.load(job + OUT_V).to(tl.int32)
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


# --------------------------------------------------------------------------------------------------- launcher
class Axis(NamedTuple):
    """One axis of a resize."""

    source: int  # pixels
    out: int
    stride: int  # bytes from a pixel of the source to the next


class Plan:
    """The jobs of a call and what both kernels need besides, on the CPU."""

    def __init__(self, patch: int, tile: Tile) -> None:
        self.patch, self.tile = patch, tile
        self.jobs: list[Job] = []
        self.programs: list[tuple[int, int]] = []  # of each job in either kernel
        self.taps: list[Tensor] = []  # int32, joined: what `Job.taps_u` and `Job.taps_v` point into
        self.places: dict[tuple[int, int], int] = {}  # (source, out) -> where the taps of this pair begin
        self.used = self.middle = self.patches = 0  # taps, bytes between the passes and patches so far
        self.first = self.second = 0  # programs of either kernel so far

    def place(self, axis: Axis) -> int:
        """Where the taps of an axis begin: for each output pixel its first source pixel, then the weights."""
        pair = axis.source, axis.out
        if pair not in self.places:
            self.places[pair] = self.used
            start, weight = reference.taps(*pair)
            self.taps += [start, weight.flatten()]
            self.used += start.numel() + weight.numel()
        return self.places[pair]

    def add(self, image: Tensor, size: Size, box: Box) -> None:
        """One more image, box [x1, y1, x2, y2] of it, to become `size`."""
        x1, y1, x2, y2 = box
        stride_y, stride_x, stride_c = image.stride()
        across, down = Axis(x2 - x1, size[1], stride_x), Axis(y2 - y1, size[0], stride_y)
        flip = reference.columns_first((down.source, across.source), size)
        u, v = (down, across) if flip else (across, down)
        job = Job(
            image.data_ptr() + y1 * stride_y + x1 * stride_x, u.stride, v.stride, stride_c,
            u.source, v.source, u.out, v.out, flip,
            self.place(u), len(reference.taps(u.source, u.out).weight),
            self.place(v), len(reference.taps(v.source, v.out).weight),
            self.middle, self.patches, self.first, self.second,
        )  # fmt: skip
        self.jobs.append(job)
        self.middle += v.source * u.out * 3
        self.patches += size[0] * size[1] // self.patch**2
        first = triton.cdiv(v.source, self.tile.rows) * triton.cdiv(u.out * 3, self.tile.columns)
        second = triton.cdiv(size[0] * size[1] * 3, self.tile.values)
        self.programs.append((first, second))
        self.first += first
        self.second += second


def patchify_images(
    images: Sequence[Tensor],
    sizes: Sequence[Size],
    boxes: Sequence[Box],
    layout: Layout,
    dtype: torch.dtype,
    *,
    tile: Tile = TILE,
) -> Tensor:
    """`reference.patchify_images` in two launches; arguments as there, checked by the caller."""
    device = images[0].device
    plan = Plan(layout.patch, tile)
    for image, size, box in zip(images, sizes, boxes, strict=True):
        plan.add(image, size, box)
    programs = torch.tensor(plan.programs).T.flatten()
    job_of_program = torch.arange(len(images)).repeat(2).repeat_interleave(programs)
    jobs = torch.tensor(plan.jobs)
    sent = send(torch.cat([jobs.flatten(), job_of_program]), device)
    taps, job = send(torch.cat(plan.taps), device), sent[jobs.numel() :]
    middle = torch.empty(plan.middle, dtype=torch.uint8, device=device)
    out = torch.empty(plan.patches, 3 * layout.frames * layout.patch**2, dtype=dtype, device=device)
    scale, shift = reference.normalization(layout.mean, layout.std)
    first_kernel[(plan.first,)](sent, job, taps, middle, ROWS=tile.rows, COLUMNS=tile.columns)
    second_kernel[(plan.second,)](
        sent, job[plan.first :], taps, middle, out, *scale, *shift,
        SIDE=layout.patch, FRAMES=layout.frames, MERGE=layout.merge, VALUES=tile.values,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
