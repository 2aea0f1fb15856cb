"""NaN and infinity, found and named before they spoil what is made of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first of these tensors, of any shape, that holds NaN or an infinite value; None if all
    are finite. Integers are passed over.

    One pass over each without a copy (its least and greatest value show both kinds), and one readback for
    all.
    """
    chosen = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not chosen:
        return None
    device = chosen[0][1].device
    ends = [torch.stack(torch.aminmax(tensor)).double().to(device) for _, tensor in chosen]
    finite = torch.stack(ends).isfinite().all(1).tolist()
    return next((name for (name, _), good in zip(chosen, finite, strict=True) if not good), None)
