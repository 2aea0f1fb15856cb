"""The head's kernels: one pass of matrix tiles in forward, one recompute by vocabulary chunks in backward, no
atomics, same bits every run.

Forward. A program owns a tile of [ROWS, COLUMNS] logits; token tiles come fastest, so the weight streams
through the cache once. It leaves three numbers a row: the tile's maximum m of y, the sum of exp(y - m), and
the sum of (y - m) exp(y - m). A second, small kernel merges them into log-sum-exp, log-prob and entropy. The
target's logit comes out of the same accumulator.
Backward. For each chunk of C columns, `logit_gradient_kernel` recomputes the tiles and writes d loss / d
logits [T, C] in the input dtype; two library matrix products take it to the gradients of hidden (summed over
chunks in float32) and weight (each row written once). Tiles whose rows all have zero gradient are written as
zeros without a product. Formulas: `reference.py`.

Legend: T tokens, V vocabulary, D hidden size, C columns of one chunk, N vocabulary tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED: bool = triton.knobs.runtime.interpret
CHUNK_ELEMENTS = (
    2**24
)  # of the [T, C] gradient buffer in backward: 32 MiB of bfloat16, less than an H100's cache
FINAL_ROWS, FINAL_TILES = 16, 64  # a program of the merging kernels: rows, and vocabulary tiles read at once


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


@triton.jit
def _tanh(x):
    doubled = tl.exp(2.0 * x)
    square = x * x
    series = x * (
        1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0))
    )  # the other form loses the digits of a small x
    return tl.where(tl.abs(x) < 0.1, series, 1.0 - 2.0 / (doubled + 1.0))


@triton.jit
def _logit_tile(
    hidden, weight, first_row, first_column, T, V, D, hidden_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
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


@triton.jit(do_not_specialize=["T", "V"])
def partial_kernel(
    hidden, weight, ids, maximum, total, weighted, target, T, V, D, hidden_stride, weight_stride, inverse_temperature, softcap, inverse_softcap,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """maximum, total, weighted float32 [N, T]; target float32 [T], written by the one program whose tile
    holds the row's id."""
    row_tiles = tl.cdiv(T, ROWS)
    tile = tl.program_id(0) // row_tiles
    first_row = (tl.program_id(0) % row_tiles) * ROWS
    first_column = tile * COLUMNS
    y = _logit_tile(
        hidden,
        weight,
        first_row,
        first_column,
        T,
        V,
        D,
        hidden_stride,
        weight_stride,
        ROWS,
        COLUMNS,
        DEPTH,
        EVEN,
        DESCRIPTORS,
        UPCAST,
    )
    if CAPPED:
        y = softcap * _tanh(y * inverse_softcap)
    y = y * inverse_temperature
    columns = first_column + tl.arange(0, COLUMNS)
    rows = first_row + tl.arange(0, ROWS)
    real = rows < T
    id = tl.load(ids + rows, mask=real, other=-1)
    hit = real & (id >= first_column) & (id < first_column + COLUMNS) & (id < V)
    tl.store(target + rows, tl.sum(tl.where(columns[None, :] == id[:, None], y, 0.0), 1), mask=hit)
    y = tl.where((columns < V)[None, :], y, float("-inf"))
    m = tl.max(y, 1)
    y = y - m[:, None]
    exponential = tl.exp(y)
    out = tile.to(tl.int64) * T + rows
    tl.store(maximum + out, m, mask=real)
    tl.store(total + out, tl.sum(exponential, 1), mask=real)
    tl.store(weighted + out, tl.sum(tl.where(exponential > 0, y * exponential, 0.0), 1), mask=real)


@triton.jit
def merge(maximum, total, weighted, rows, T, N, TILES: tl.constexpr):
    """(log-sum-exp float64, entropy float32) of `rows` from the partials of all N tiles; rows past T repeat
    the last. Rounded to float32, the log-sum-exp would shift all of a row's probabilities alike."""
    rows = tl.minimum(rows, T - 1)
    m = tl.full(rows.shape, float("-inf"), tl.float32)
    for start in range(0, N, TILES):
        tiles = start + tl.arange(0, TILES)
        offset = tiles[:, None].to(tl.int64) * T + rows[None, :]
        m = tl.maximum(
            m, tl.max(tl.load(maximum + offset, mask=(tiles < N)[:, None], other=float("-inf")), 0)
        )
    s = tl.zeros(rows.shape, tl.float32)
    u = tl.zeros(rows.shape, tl.float32)
    for start in range(0, N, TILES):
        tiles = start + tl.arange(0, TILES)
        inside = (tiles < N)[:, None]
        offset = tiles[:, None].to(tl.int64) * T + rows[None, :]
        part = tl.load(total + offset, mask=inside, other=0.0)
        shift = tl.where(inside, tl.load(maximum + offset, mask=inside, other=0.0) - m[None, :], 0.0)
        factor = tl.exp(shift)
        s += tl.sum(part * factor, 0)
        u += tl.sum((tl.load(weighted + offset, mask=inside, other=0.0) + shift * part) * factor, 0)
    log_s = tl.log(s.to(tl.float64))
    return m.to(tl.float64) + log_s, (log_s - (u / s).to(tl.float64)).to(tl.float32)


@triton.jit(do_not_specialize=["T", "N"])
def finish_kernel(
    maximum, total, weighted, target, logprob, entropy, lse, T, N, ROWS: tl.constexpr, TILES: tl.constexpr
):
    """logprob, entropy float32 [T] and lse float64 [T] from the partials [N, T] and target [T]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < T
    row_lse, row_entropy = merge(maximum, total, weighted, rows, T, N, TILES)
    tl.store(
        logprob + rows,
        (tl.load(target + rows, mask=real, other=0.0).to(tl.float64) - row_lse).to(tl.float32),
        mask=real,
    )
    tl.store(entropy + rows, row_entropy, mask=real)
    tl.store(lse + rows, row_lse, mask=real)


@triton.jit
def _store_tile(out, tile, first_row, first_column, T, stride, DESCRIPTORS: tl.constexpr):
    """Rows past T are left out. The buffer is whole tiles wide: what lies past the vocabulary's last column
    is never read."""
    if DESCRIPTORS:
        out.store([first_row, first_column], tile.to(out.dtype))
    else:
        rows = first_row + tl.arange(0, tile.shape[0])
        offset = rows.to(tl.int64)[:, None] * stride + (first_column + tl.arange(0, tile.shape[1]))[None, :]
        tl.store(out + offset, tile.to(out.dtype.element_ty), mask=(rows < T)[:, None])


@triton.jit(do_not_specialize=["T", "first", "stop"])
def logit_gradient_kernel(
    hidden, weight, ids, lse, entropy, grad_logprob, grad_entropy, out, T, first, stop, D, hidden_stride, weight_stride, out_stride,
    inverse_temperature, softcap, inverse_softcap, CAPPED: tl.constexpr, WITH_ENTROPY: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [T, C]: d loss / d logits of the columns [first, stop), before soft-cap and temperature; the
    vectors are [T], lse float64. For float32 inputs, what lse loses in float32 is made up for by a factor a
    row; narrower ones could not tell, and registers are scarce."""
    row_tiles = tl.cdiv(T, ROWS)
    first_row = (tl.program_id(0) % row_tiles) * ROWS
    first_column = first + (tl.program_id(0) // row_tiles) * COLUMNS
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    real = rows < T
    g = tl.load(grad_logprob + rows, mask=real, other=0.0)
    active = g != 0
    if WITH_ENTROPY:
        h = tl.load(grad_entropy + rows, mask=real, other=0.0)
        active = active | (h != 0)
    if tl.max(active.to(tl.int32), 0) == 0:
        _store_tile(
            out,
            tl.zeros((ROWS, COLUMNS), tl.float32),
            first_row,
            first_column - first,
            T,
            out_stride,
            DESCRIPTORS,
        )
    else:
        y = _logit_tile(
            hidden,
            weight,
            first_row,
            first_column,
            T,
            stop,
            D,
            hidden_stride,
            weight_stride,
            ROWS,
            COLUMNS,
            DEPTH,
            EVEN,
            DESCRIPTORS,
            UPCAST,
        )
        slope = inverse_temperature
        if CAPPED:
            bent = _tanh(y * inverse_softcap)
            slope = (1.0 - bent * bent) * inverse_temperature
            y = softcap * bent
        row_lse = tl.load(lse + rows, mask=real, other=0.0)
        rounded = row_lse.to(tl.float32)
        y = y * inverse_temperature - rounded[:, None]
        p = tl.exp(y)
        if EXACT:
            rest = (row_lse - rounded.to(tl.float64)).to(tl.float32)
            y -= rest[:, None]
            p *= tl.exp(-rest)[:, None]
        gradient = g[:, None] * (
            tl.where(columns[None, :] == tl.load(ids + rows, mask=real, other=-1)[:, None], 1.0, 0.0) - p
        )
        if WITH_ENTROPY:
            gradient -= h[:, None] * p * (y + tl.load(entropy + rows, mask=real, other=0.0)[:, None])
        _store_tile(out, gradient * slope, first_row, first_column - first, T, out_stride, DESCRIPTORS)


def _check_device(tensor: Tensor) -> None:
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
        temperature: float,
        softcap: float | None,
        descriptors: bool | None,
        entropy_gradient: bool = False,
    ) -> None:
        _check_device(hidden)
        self.hidden, self.weight = _rows_contiguous(hidden), _rows_contiguous(weight)
        hip = torch.version.hip is not None
        major, minor = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else (9, 0)
        if descriptors is None:
            descriptors = not hip and major >= 9
        self.descriptors = descriptors and all(_bulk_readable(t) for t in (self.hidden, self.weight))
        wide = self.descriptors and softcap is None and not entropy_gradient
        aligned = self.descriptors or (_aligned(self.hidden) and _aligned(self.weight))
        self.tiles = choose_tiles(hidden.dtype, None if hip else 10 * major + minor, wide, aligned)
        cap = 1.0 if softcap is None else softcap
        self.scalars = (1 / temperature, cap, 1 / cap)
        self.constants = {
            "CAPPED": softcap is not None, "ROWS": self.tiles.rows, "COLUMNS": self.tiles.columns, "DEPTH": self.tiles.depth,
            "EVEN": hidden.shape[1] % self.tiles.depth == 0, "DESCRIPTORS": self.descriptors, "UPCAST": INTERPRETED,
            "num_warps": self.tiles.warps, "num_stages": self.tiles.stages,
        }  # fmt: skip

    def described(self, matrix: Tensor, rows: int, columns: int) -> Tensor | TensorDescriptor:
        return TensorDescriptor.from_tensor(matrix, [rows, columns]) if self.descriptors else matrix

    def matrices(self) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor]:
        tiles = self.tiles
        return self.described(self.hidden, tiles.rows, tiles.depth), self.described(
            self.weight, tiles.columns, tiles.depth
        )


def partials(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float,
    softcap: float | None,
    descriptors: bool | None = None,
) -> list[Tensor]:
    """[maximum, total, weighted] float32 [N, T] and target float32 [T] (NaN for an id outside the
    vocabulary), for `merge`. T > 0."""
    head = Head(hidden, weight, temperature, softcap, descriptors)
    T, D = hidden.shape
    V = len(weight)
    N = triton.cdiv(V, head.tiles.columns)
    out = [torch.empty((N, T), dtype=torch.float32, device=hidden.device) for _ in range(3)]
    out.append(hidden.new_full((T,), torch.nan, dtype=torch.float32))
    grid = (triton.cdiv(T, head.tiles.rows) * N,)
    strides = head.hidden.stride(0), head.weight.stride(0)
    with torch.cuda.device_of(hidden):
        partial_kernel[grid](
            *head.matrices(), ids.contiguous(), *out, T, V, D, *strides, *head.scalars, **head.constants
        )
    return out


def forward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float,
    softcap: float | None,
    descriptors: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob, entropy float32 [T]; log-sum-exp float64 [T]). As `reference.forward`; `descriptors` forces
    or forbids the bulk copy engine (None: by chip)."""
    _check_device(hidden)
    T = len(hidden)
    logprob, entropy, lse = (
        torch.empty(T, dtype=dtype, device=hidden.device)
        for dtype in (torch.float32, torch.float32, torch.float64)
    )
    if T:
        parts = partials(hidden, weight, ids, temperature, softcap, descriptors)
        with torch.cuda.device_of(hidden):
            finish_kernel[(triton.cdiv(T, FINAL_ROWS),)](
                *parts, logprob, entropy, lse, T, len(parts[0]), ROWS=FINAL_ROWS, TILES=FINAL_TILES
            )
    return logprob, entropy, lse


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a float32 result. The library rounds the sums to the input dtype unless told otherwise."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def chunk_columns(T: int, V: int, columns: int) -> int:
    """C: a multiple of the tile's columns, so that T * C stays near `CHUNK_ELEMENTS`, but wide enough for the
    library's matrix product."""
    return min(triton.cdiv(V, columns), max(CHUNK_ELEMENTS // T, 1024) // columns) * columns


def backward(
    grad_logprob: Tensor, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, ids: Tensor, lse: Tensor, entropy: Tensor,
    temperature: float, softcap: float | None, want_hidden: bool, want_weight: bool, descriptors: bool | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and weight in their dtype; one not wanted is an empty tensor. As
    `reference.backward`."""
    head = Head(hidden, weight, temperature, softcap, descriptors, entropy_gradient=grad_entropy is not None)
    T, D = hidden.shape
    V = len(weight)
    grad_states = hidden.new_zeros((T, D) if want_hidden else (0,), dtype=torch.float32)
    grad_weight = torch.empty((V, D) if want_weight else (0,), dtype=weight.dtype, device=weight.device)
    if T == 0:
        return grad_states.to(hidden.dtype), grad_weight.zero_()
    width = chunk_columns(T, V, head.tiles.columns)
    cut_off = (
        INTERPRETED and hidden.dtype == torch.bfloat16
    )  # where the interpreter stores bfloat16, it does not round
    chunk = torch.empty((T, width), dtype=torch.float32 if cut_off else hidden.dtype, device=hidden.device)
    tiles = (*head.matrices(), head.described(chunk, head.tiles.rows, head.tiles.columns))
    vectors = [t if t is None else t.contiguous() for t in (ids, lse, entropy, grad_logprob, grad_entropy)]
    vectors[4] = vectors[3] if grad_entropy is None else vectors[4]
    flags = {"WITH_ENTROPY": grad_entropy is not None, "EXACT": hidden.dtype == torch.float32}
    for first in range(0, V, width):
        stop = min(first + width, V)
        grid = (triton.cdiv(T, head.tiles.rows) * triton.cdiv(stop - first, head.tiles.columns),)
        strides = head.hidden.stride(0), head.weight.stride(0), width
        numbers = (T, first, stop, D, *strides, *head.scalars)
        with torch.cuda.device_of(hidden):
            logit_gradient_kernel[grid](*tiles[:2], *vectors, tiles[2], *numbers, **flags, **head.constants)
        gradient = chunk[:, : stop - first].to(hidden.dtype)
        if want_hidden:
            grad_states += _product(gradient, head.weight[first:stop])
        if want_weight:
            torch.mm(gradient.T, head.hidden, out=grad_weight[first:stop])
    return grad_states.to(hidden.dtype), grad_weight
