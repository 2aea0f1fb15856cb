"""How an operator reaches the code that computes it: the one idiom of every `op.py`.

An operator's folder has `reference.py`, the mathematics in plain PyTorch and the path of CPU tensors, and
`triton.py`, the kernels, with functions of the same names and signatures. `op.py` registers an operator with
PyTorch, so that it survives `torch.compile`, whose body is one call:

    return implementation(reference, tensor).function(...)

On meta and fake tensors PyTorch runs what `register_fake` was given instead. A registered operator takes flat
arguments only (tensors, numbers, strings and lists of them), so its body packs them into the operator's
records.

`shared_prefix_attention` alone has no kernel of its own: its caller chooses a `Backend`, once and by name.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from torch import Tensor


def on_kernels(tensor: Tensor) -> bool:
    """Whether the Triton kernels compute on this tensor's device."""
    return tensor.is_cuda


def implementation(reference: ModuleType, tensor: Tensor) -> ModuleType:
    """The module `triton` beside `reference` where `on_kernels(tensor)`, else `reference` itself.

    Triton is imported on first use: a machine without CUDA need not have it.
    """
    if not on_kernels(tensor):
        return reference
    return import_module(reference.__name__.removesuffix("reference") + "triton")
