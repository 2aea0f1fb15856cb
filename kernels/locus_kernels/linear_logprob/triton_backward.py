"""The head's backward pass: the logits' gradient recomputed by vocabulary chunks, and two library matrix
products for each. No atomics.

For each chunk of C columns, `logit_gradient_kernel` recomputes the tiles and writes d loss / d logits [T, C]
in the input dtype; the products take it to the gradients of hidden (summed over chunks in float32) and weight
(each row written once). Tiles whose rows all have zero gradient are written as zeros without a product.

Legend: T tokens, V vocabulary, D hidden size, C columns of one chunk. Formulas: `reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from locus_kernels.launch import INTERPRETED
from locus_kernels.linear_logprob.records import Saved, Scale, Slope, Wanted
from locus_kernels.linear_logprob.triton_head import Head, logit_tile, tanh

CHUNK_ELEMENTS = 2**24  # of the [T, C] gradient buffer: 32 MiB of bfloat16, less than an H100's cache


# ----------------------------------------------------------------------------------------------------- kernel
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
    hidden, weight, ids, lse, entropy, grad_logprob, grad_entropy, out,
    T, first, stop, D, hidden_stride, weight_stride, out_stride,
    inverse_temperature, softcap, inverse_softcap,
    CAPPED: tl.constexpr, WITH_ENTROPY: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
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
        zeros = tl.zeros((ROWS, COLUMNS), tl.float32)
        _store_tile(out, zeros, first_row, first_column - first, T, out_stride, DESCRIPTORS)
    else:
        y = logit_tile(
            hidden, weight, first_row, first_column, T, stop, D, hidden_stride, weight_stride,
            ROWS, COLUMNS, DEPTH, EVEN, DESCRIPTORS, UPCAST,
        )  # fmt: skip
        slope = inverse_temperature
        if CAPPED:
            bent = tanh(y * inverse_softcap)
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
        hit = columns[None, :] == tl.load(ids + rows, mask=real, other=-1)[:, None]
        gradient = g[:, None] * (tl.where(hit, 1.0, 0.0) - p)
        if WITH_ENTROPY:
            gradient -= h[:, None] * p * (y + tl.load(entropy + rows, mask=real, other=0.0)[:, None])
        _store_tile(out, gradient * slope, first_row, first_column - first, T, out_stride, DESCRIPTORS)


# --------------------------------------------------------------------------------------------------- launcher
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
    slope: Slope,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    saved: Saved,
    scale: Scale,
    wanted: Wanted,
    *,
    descriptors: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight in their dtype, as `reference.backward`; one not wanted is an empty
    tensor. `descriptors`: as in `forward`."""
    with_entropy = slope.entropy is not None
    head = Head(hidden, weight, scale, descriptors, entropy_gradient=with_entropy)
    T, D = hidden.shape
    V = len(weight)
    grad_states = hidden.new_zeros((T, D) if wanted.hidden else (0,), dtype=torch.float32)
    grad_weight = torch.empty((V, D) if wanted.weight else (0,), dtype=weight.dtype, device=weight.device)
    if T == 0:
        return grad_states.to(hidden.dtype), grad_weight.zero_()
    width = chunk_columns(T, V, head.tiles.columns)
    # where the interpreter stores bfloat16, it does not round
    stored = torch.float32 if INTERPRETED and hidden.dtype == torch.bfloat16 else hidden.dtype
    chunk = torch.empty((T, width), dtype=stored, device=hidden.device)
    matrices, out = head.matrices(), head.described(chunk, head.tiles.rows, head.tiles.columns)
    g = slope.logprob.contiguous()
    h = g if slope.entropy is None else slope.entropy.contiguous()  # without a gradient it is not read
    vectors = (ids.contiguous(), saved.lse.contiguous(), saved.entropy.contiguous(), g, h)
    strides = head.hidden.stride(0), head.weight.stride(0), width
    flags = {"WITH_ENTROPY": with_entropy, "EXACT": hidden.dtype == torch.float32}
    for first in range(0, V, width):
        stop = min(first + width, V)
        grid = (triton.cdiv(T, head.tiles.rows) * triton.cdiv(stop - first, head.tiles.columns),)
        numbers = (T, first, stop, D, *strides, *head.scalars)
        with torch.cuda.device_of(hidden):
            logit_gradient_kernel[grid](*matrices, *vectors, out, *numbers, **flags, **head.constants)
        gradient = chunk[:, : stop - first].to(hidden.dtype)
        if wanted.hidden:
            grad_states += _product(gradient, head.weight[first:stop])
        if wanted.weight:
            torch.mm(gradient.T, head.hidden, out=grad_weight[first:stop])
    return grad_states.to(hidden.dtype), grad_weight
