"""Where backward goes from the replies to their prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from locus_fast.policy import Prefix


def cut(prefix: Prefix) -> tuple[Prefix, Callable[[], None]]:
    """(the prefix to compute replies on, what takes its gradient on through the prompts when the replies' backward has run).

    One backward through both would hold every weight's gradient of the replies' pass until the prompts' pass adds its own: as much memory as the
    language model's gradients. Cut in two, each is added to the gradients that are there at once. The given prefix should not be used any more.
    """
    ends = [t for pair in prefix.kv.values() for t in pair] + [prefix.last_hidden]
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in ends]
    kv = {layer: (leaves[2 * i], leaves[2 * i + 1]) for i, layer in enumerate(prefix.kv)}

    def onward() -> None:
        reached = [(end, leaf.grad) for end, leaf in zip(ends, leaves, strict=True) if leaf.grad is not None]
        ends.clear()
        leaves.clear()
        torch.autograd.backward([end for end, _ in reached], [gradient for _, gradient in reached])

    return replace(prefix, kv=kv, last_hidden=leaves[-1]), onward
