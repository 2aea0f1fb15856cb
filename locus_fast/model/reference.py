"""The frozen reference policy that the KL holds the policy to, by kind. Each but the first costs less device
memory than the one before:

- copy: the base's weights once more, in the policy's dtype.
- int8, nf4: the same with the language model's linear layers quantised. The reference is then the base with
  that error.
- host: the copy lies in pinned host memory; each layer is on the device only while it computes. Exact, and
  slow over a narrow bus.
- adapters: the policy itself without the adapters that are trained. Exact and free; what LoRA takes.

It is the model as the run was given it: where --model holds adapters, with these as they were, and not the
base that they belong to. Those that stay under new ones are simply left on; of those that are trained further
a frozen copy is kept beside them, which is small. So the KL of the first step is 0.

What the policy does not train is shared with it, not copied.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from locus_fast.errors import UserError
from locus_fast.model.adapters import adapters_off, has_adapters
from locus_fast.model.quantize import language_linears, quantize

REFERENCES = ("auto", "copy", "int8", "nf4", "host")


@dataclass(frozen=True)
class Reference:
    """A policy that stays as it was when this was made. kind: copy, int8, nf4, host or adapters."""

    kind: str
    held: Any
    # host: parameter -> its values in host memory
    pages: dict[Parameter, Tensor] = field(default_factory=dict)
    device: torch.device | None = None  # host: where it computes

    @contextmanager
    def model(self) -> Iterator[Any]:
        """The reference as a model for `locus_fast.model.policy`, as long as the block lasts; to be used
        without gradients."""
        if self.kind == "adapters":
            with adapters_off(self.held):
                yield self.held
        elif self.kind == "host":
            with self._paged():
                yield self.held
        else:
            yield self.held

    @contextmanager
    def _paged(self) -> Iterator[None]:
        """Embeddings, head and norms on the device for the whole block; each layer for its own pass, by
        hooks."""
        model = self.held.model
        layers = [*model.language_model.layers, *model.visual.blocks]
        of_layers = {p for layer in layers for p in layer.parameters()}
        rest = [p for p in self.held.parameters() if p not in of_layers]
        hooks = [
            layer.register_forward_pre_hook(lambda layer, _: self._bring(layer.parameters()))
            for layer in layers
        ]
        hooks += [
            layer.register_forward_hook(lambda layer, *_: self._leave(layer.parameters())) for layer in layers
        ]
        try:
            self._bring(rest)
            yield
        finally:
            self._leave(self.held.parameters())
            for hook in hooks:
                hook.remove()

    def _bring(self, parameters: Any) -> None:
        for p in parameters:
            if p in self.pages:
                p.data = self.pages[p].to(self.device, non_blocking=True)

    def _leave(self, parameters: Any) -> None:
        for p in parameters:
            if p in self.pages:
                p.data = self.pages[p]


def make_reference(model: Any, kind: str = "auto") -> Reference:
    """The reference of a policy as it is now; with adapters: as it was given.

    kind: one of REFERENCES, auto for adapters where there are some, else copy.

    What is to be frozen must be so already. Raises UserError for int8 and nf4 without bitsandbytes, and for
    another kind than auto with adapters.
    """
    if has_adapters(model):
        if kind != "auto":
            raise UserError(
                f"--reference {kind}: with --lora the reference is the policy without its adapters, at no "
                "cost; leave the option away."
            )
        return Reference("adapters", model)
    # what a copy shares with its original
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    if kind in ("int8", "nf4"):  # the quantised weights are made from the policy's own
        weights = [linear.weight for _, _, linear in language_linears(model)]
        held = copy.deepcopy(model, {**shared, **{id(p): p for p in weights}})
        quantize(held, kind, model.device)
        return Reference(kind, held.requires_grad_(False))
    if kind == "host":
        paged = {
            id(p): Parameter(_in_host_memory(p), requires_grad=False)
            for p in model.parameters()
            if p.requires_grad
        }
        held = copy.deepcopy(model, {**shared, **paged})
        return Reference(kind, held, {p: p.data for p in paged.values()}, model.device)
    return Reference("copy", copy.deepcopy(model, shared).requires_grad_(False))


def _in_host_memory(p: Parameter) -> Tensor:
    """A copy of the values in host memory, pinned where they are for a GPU."""
    return torch.empty_like(p, device="cpu", pin_memory=p.is_cuda, requires_grad=False).copy_(p.detach())
