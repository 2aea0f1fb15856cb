"""The public decoding step: one registered operator, so that it survives `torch.compile`; the reference on
CPU, the kernels on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from locus_kernels.dispatch import implementation
from locus_kernels.shared_prefix_decode import reference
from locus_kernels.shared_prefix_decode.reference import Bounds, Inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --------------------------------------------------------------------------------------------------- operator
def _compute(
    q: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    cu_prompts: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    own_lengths: Tensor,
    cu_rows: Tensor,
    scale: float,
    longest_prompt: int,
    most_rows: int,
    longest_own: int,
) -> Tensor:
    inputs = Inputs(q, prompt_k, prompt_v, cu_prompts, own_k, own_v, own_lengths, cu_rows)
    bounds = Bounds(longest_prompt, most_rows, longest_own)
    return implementation(reference, q).shared_prefix_decode(inputs, scale, bounds)


_operator = torch.library.custom_op("locus_kernels::shared_prefix_decode", _compute, mutates_args=())


@_operator.register_fake
def _shape(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


# ----------------------------------------------------------------------------------------------------- public
def _check_floats(inputs: Inputs) -> None:
    q, prompt_k, prompt_v, _, own_k, own_v, *_ = inputs
    known = DTYPES if q.is_cuda else (*DTYPES, torch.float64)
    if q.ndim != 3 or q.shape[1] < 1 or not 16 <= q.shape[2] <= 256 or q.dtype not in known:
        expected = "float32, bfloat16 or float16 [rows, heads >= 1, 16 to 256]"
        raise ValueError(f"q: expected {expected}, got {q.dtype} {list(q.shape)}")
    R, H, D = q.shape
    if prompt_k.ndim != 3 or prompt_k.shape[1] < 1 or H % prompt_k.shape[1] or prompt_k.shape[2] != D:
        expected = f"[tokens, key heads that divide {H}, {D}]"
        raise ValueError(f"prompt_k: expected {expected}, got {list(prompt_k.shape)}")
    if prompt_v.shape != prompt_k.shape:
        raise ValueError(
            f"prompt_v: expected the shape of prompt_k, {list(prompt_k.shape)}, got {list(prompt_v.shape)}"
        )
    if own_k.ndim != 4 or own_k.shape[:2] != (R, prompt_k.shape[1]) or own_k.shape[3] != D:
        raise ValueError(
            f"own_k: expected [{R}, {prompt_k.shape[1]}, capacity, {D}], got {list(own_k.shape)}"
        )
    if own_v.shape != own_k.shape:
        raise ValueError(f"own_v: expected the shape of own_k, {list(own_k.shape)}, got {list(own_v.shape)}")
    for name, tensor in (
        ("q", q),
        ("prompt_k", prompt_k),
        ("prompt_v", prompt_v),
        ("own_k", own_k),
        ("own_v", own_v),
    ):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {tensor.device}")
        if tensor.stride(-1) != 1:
            got = f"stride {tensor.stride(-1)}; call .contiguous() first"
            raise ValueError(f"{name}: expected a contiguous last dimension, got {got}")


def _check_integers(inputs: Inputs) -> None:
    q, cu_prompts, own_lengths, cu_rows = inputs.q, inputs.cu_prompts, inputs.own_lengths, inputs.cu_rows
    if cu_prompts.dtype != torch.int32 or cu_prompts.ndim != 1 or cu_prompts.shape[0] < 1:
        raise ValueError(
            f"cu_prompts: expected int32 [prompts + 1], got {cu_prompts.dtype} {list(cu_prompts.shape)}"
        )
    for name, tensor, shape in (
        ("cu_rows", cu_rows, cu_prompts.shape),
        ("own_lengths", own_lengths, q.shape[:1]),
    ):
        if tensor.dtype != torch.int32 or tensor.shape != shape:
            raise ValueError(f"{name}: expected int32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    for name, tensor in (("cu_prompts", cu_prompts), ("cu_rows", cu_rows), ("own_lengths", own_lengths)):
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor; call .contiguous() first")


def _check_bounds(bounds: Bounds, capacity: int) -> None:
    longest_prompt, most_rows, longest_own = bounds
    if longest_prompt < 0 or most_rows < 0 or not 0 <= longest_own <= capacity:
        expected = f"0 <= longest_prompt, 0 <= most_rows and 0 <= longest_own <= {capacity}"
        raise ValueError(f"expected {expected}, got {longest_prompt}, {most_rows} and {longest_own}")


def shared_prefix_decode(
    q: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    cu_prompts: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    own_lengths: Tensor,
    cu_rows: Tensor,
    *,
    scale: float,
    longest_prompt: int,
    most_rows: int,
    longest_own: int | None = None,
) -> Tensor:
    """One new token a row attends to its group's prompt and to its own past, this token included: [R, H, D],
    contiguous, in q's dtype.

    R rows (replies), B prompts of N tokens together, H query heads, K key heads (H a multiple of K; query
    head h reads key head h // (H / K)), D 16 to 256. float32, bfloat16 or float16, one dtype for all (float64
    too on CPU); the last dimension contiguous, other strides free.

    - q [R, H, D].
    - prompt_k, prompt_v [N, K, D], cu_prompts int32 [B + 1]: prompt b is tokens cu_prompts[b] to cu_prompts[b
      + 1]. It may be empty.
    - own_k, own_v [R, K, L, D], own_lengths int32 [R]: of row r the first own_lengths[r] of L tokens are
      valid; nothing else is used.
    - cu_rows int32 [B + 1]: rows cu_rows[b] to cu_rows[b + 1] are the replies to prompt b, maybe none.
      cu_rows[0] is 0. Rows at or past cu_rows[B] belong to no prompt: their output is 0. A row without any
      key has output 0 as well.
    - scale: of q . k, before the softmax; usually D ** -0.5.
    - longest_prompt, most_rows, longest_own (default L): upper bounds, on the host, of a prompt's tokens, a
      group's rows and own_lengths.

    On CUDA the launches depend on shapes and bounds alone and nothing is read back, so that a captured CUDA
    graph can be replayed with other cu_rows and own_lengths; offsets or lengths outside their bounds are then
    undefined behaviour. On CPU they raise ValueError.
    Two launches: the prompt's keys are read once a group and key head as long as most_rows * H / K <= 128 (64
    for D over 128; 16 in float32), then merged with the row's own by log-sum-exp ("Online normalizer
    calculation for softmax", Milakov and Gimelshein, 2018). No atomics: equal bits every time. There is no
    gradient.
    Raises ValueError for a wrong dtype, shape, stride or device, or a bound out of range.
    """
    inputs = Inputs(q, prompt_k, prompt_v, cu_prompts, own_k, own_v, own_lengths, cu_rows)
    _check_floats(inputs)
    _check_integers(inputs)
    capacity = own_k.shape[2]
    bounds = Bounds(longest_prompt, most_rows, capacity if longest_own is None else longest_own)
    _check_bounds(bounds, capacity)
    # on a CPU, PyTorch's dispatch of a registered operator costs as much as a small model's step
    direct = q.device.type == "cpu" and not torch.compiler.is_compiling()
    inputs = Inputs._make(tensor.detach() for tensor in inputs)
    if direct:
        return _compute(*inputs, float(scale), *bounds)
    return _operator(*inputs, float(scale), *bounds)
