"""The language model's linear layers in 4 or 8 bits, by bitsandbytes: for weights that are read and never
trained.

nf4: blocks of 64 weights, each an index into 16 quantiles of the normal distribution, with double
quantisation of the blocks' scales (QLoRA, arXiv 2305.14314). int8: rows of weights in 8 bits with a scale
each; activations keep their dtype, for in 8 bits they double the error and in bitsandbytes' own layer they
pass through float16. Embeddings, head, norms and vision tower stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from locus_fast.libraries import optional

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = ("nf4", "int8")


def language_linears(model: Any) -> Iterator[tuple[Any, str, torch.nn.Linear]]:
    """(parent, name in it, layer) of each linear layer of the language model's decoder layers."""
    for layer in model.model.language_model.layers:
        for parent in (layer.self_attn, layer.mlp):
            yield from (
                (parent, name, linear) for name, linear in parent.named_children() if name in PROJECTIONS
            )


def linear_names(model: Any) -> dict[int, str]:
    """The model's name of each linear layer of the language model's decoder layers, or of what stands in its
    place, by its identity, in their order."""
    names = {id(module): name for name, module in model.named_modules()}
    return {id(linear): names[id(linear)] for _, _, linear in language_linears(model)}


class Int8Linear(torch.nn.Module):
    """A linear layer for reading. codes: int8 [out, in]; scale: float32 [out], of each row; weight[o, i] =
    codes[o, i] * scale[o]. bias: [out].

    Takes and gives [..., in] and [..., out] of one floating dtype. The codes are exact in any, so computing
    adds one rounding of the output.
    """

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.codes, self.scale = torch.nn.Buffer(codes), torch.nn.Buffer(scale)
        self.bias = None if bias is None else torch.nn.Buffer(bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        out = (torch.nn.functional.linear(x, self.codes.to(x.dtype)) * self.scale).to(x.dtype)
        return out if self.bias is None else out + self.bias


@torch.no_grad()
def quantize(model: Any, kind: str, device: torch.device) -> None:
    """Replaces the language model's linear layers in place by quantised ones on the device, one at a time.
    Their old weights are not written to.

    kind: one of KINDS. The quantised weights take no gradient; what flows through an nf4 layer does. Raises
    UserError without bitsandbytes.
    """
    library = optional("bitsandbytes", f"--quantize or --reference {kind}")
    for parent, name, linear in list(language_linears(model)):
        weight = linear.weight.detach().to(device)
        if kind == "nf4":
            shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
            new = library.nn.Linear4bit(
                *shape, bias=bias, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
            )
            new.weight = library.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            new.support_avx512bf16_for_cpu = (
                False  # else the first pass repacks the weights in place, which fails for odd sizes
            )
            new.bias = linear.bias
        else:
            codes, largest, _ = library.functional.int8_vectorwise_quant(weight.half())
            new = Int8Linear(codes, largest / 127, linear.bias)
        setattr(parent, name, new.to(device).train(linear.training))
    if kind == "nf4":
        model.is_loaded_in_4bit = True  # what peft asks for before it adapts such a layer


def weight_of(linear: Any) -> Tensor:
    """The weight [out, in] of a linear layer, dequantised if it is nf4."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return linear.weight.detach()
    return optional("bitsandbytes", "--quantize nf4").functional.dequantize_4bit(linear.weight.data, state)
