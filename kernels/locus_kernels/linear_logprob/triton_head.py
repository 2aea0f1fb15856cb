"""What the head's two matrix kernels share: the shape of their tiles, the product of a tile, and the
arguments that launch them.

Legend: T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from locus_kernels.launch import INTERPRETED
from locus_kernels.linear_logprob.records import Scale


# ------------------------------------------------------------------------------------------------------ tiles
@dataclass(frozen=True)
class Tiles:
    """The shape of a program's work in the matrix kernels, fixed for a device and a dtype."""

    rows: int  # tokens
    columns: int  # vocabulary
    depth: int  # of the hidden size, one step of the inner loop
    warps: int
    stages: int


def choose_tiles(dtype: torch.dtype, capability: int | None, wide: bool, aligned: bool = True) -> Tiles:
    """capability: 80, 90, 100, ... of a CUDA device, None for AMD. `wide`: the bulk copy engine feeds the
    tiles and the epilogue is short (no soft-cap, no entropy gradient), so that 256 columns stay within the
    registers. `aligned`: rows can be read 16 bytes at a time."""
    if dtype == torch.float32:  # exact products without tensor cores: for checks, not for speed
        return Tiles(64, 64, 32, 8, 2)
    if not aligned:
        return Tiles(64, 64, 64, 8, 2)
    if capability is None:
        return Tiles(128, 128, 64, 8, 2)
    if capability >= 120:  # the consumer chips have half the shared memory
        return Tiles(128, 128, 64, 8, 3)
    return Tiles(128, 256 if wide and capability >= 90 else 128, 64, 8, 4)


# ----------------------------------------------------------------------------------------------------- device
@triton.jit
def tanh(x):
    doubled = tl.exp(2.0 * x)
    square = x * x
    # the other form loses the digits of a small x
    series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0)))
    return tl.where(tl.abs(x) < 0.1, series, 1.0 - 2.0 / (doubled + 1.0))


@triton.jit
def logit_tile(
    hidden, weight, first_row, first_column, T, V, D, hidden_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Raw logits float32 [ROWS, COLUMNS]. Rows past T and columns past V repeat the last one or are 0: the
    caller masks them."""
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    if DESCRIPTORS:
        for k in range(0, D, DEPTH):
            a = hidden.load([first_row, k])
            b = weight.load([first_column, k])
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            accumulator = tl.dot(a, b.T, accumulator)
    else:
        depth = tl.arange(0, DEPTH)
        rows = tl.minimum(first_row + tl.arange(0, ROWS), T - 1).to(tl.int64)
        columns = tl.minimum(first_column + tl.arange(0, COLUMNS), V - 1).to(tl.int64)
        a_pointers = hidden + rows[:, None] * hidden_stride + depth[None, :]
        b_pointers = weight + columns[:, None] * weight_stride + depth[None, :]
        for k in range(0, D, DEPTH):
            if EVEN:
                a = tl.load(a_pointers)
                b = tl.load(b_pointers)
            else:
                inside = (k + depth < D)[None, :]
                a = tl.load(a_pointers, mask=inside, other=0.0)
                b = tl.load(b_pointers, mask=inside, other=0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            accumulator = tl.dot(a, b.T, accumulator, input_precision="ieee")
            a_pointers += DEPTH
            b_pointers += DEPTH
    return accumulator


# -------------------------------------------------------------------------------------------------- launching
def check_device(tensor: Tensor) -> None:
    if not (tensor.is_cuda or INTERPRETED):
        raise ValueError(f"expected tensors on a CUDA device, got {tensor.device}")


def _rows_contiguous(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _aligned(matrix: Tensor) -> bool:
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def _bulk_readable(matrix: Tensor) -> bool:
    whole_rows = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return matrix.element_size() == 2 and _aligned(matrix) and matrix.numel() > 0 and whole_rows


class Head:
    """What both matrix kernels take: the two matrices, as descriptors of the bulk copy engine where it can
    read them, and the constants."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        scale: Scale,
        descriptors: bool | None,
        entropy_gradient: bool = False,
    ) -> None:
        """descriptors: whether to use the bulk copy engine; None: where the chip has it."""
        check_device(hidden)
        self.hidden, self.weight = _rows_contiguous(hidden), _rows_contiguous(weight)
        hip = torch.version.hip is not None
        major, minor = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else (9, 0)
        if descriptors is None:
            descriptors = not hip and major >= 9
        self.descriptors = descriptors and all(_bulk_readable(t) for t in (self.hidden, self.weight))
        temperature, softcap = scale
        wide = self.descriptors and softcap is None and not entropy_gradient
        aligned = self.descriptors or (_aligned(self.hidden) and _aligned(self.weight))
        self.tiles = choose_tiles(hidden.dtype, None if hip else 10 * major + minor, wide, aligned)
        cap = 1.0 if softcap is None else softcap
        self.scalars = (1 / temperature, cap, 1 / cap)
        self.constants = {
            "CAPPED": softcap is not None, "EVEN": hidden.shape[1] % self.tiles.depth == 0,
            "ROWS": self.tiles.rows, "COLUMNS": self.tiles.columns, "DEPTH": self.tiles.depth,
            "DESCRIPTORS": self.descriptors, "UPCAST": INTERPRETED,
            "num_warps": self.tiles.warps, "num_stages": self.tiles.stages,
        }  # fmt: skip

    def described(self, matrix: Tensor, rows: int, columns: int) -> Tensor | TensorDescriptor:
        return TensorDescriptor.from_tensor(matrix, [rows, columns]) if self.descriptors else matrix

    def matrices(self) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor]:
        tiles = self.tiles
        hidden = self.described(self.hidden, tiles.rows, tiles.depth)
        return hidden, self.described(self.weight, tiles.columns, tiles.depth)
