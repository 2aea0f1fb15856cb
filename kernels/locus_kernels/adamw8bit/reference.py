"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) with 8-bit moments, in plain PyTorch.

Moments are kept in blocks of 256 consecutive elements. With r = sqrt(exp_avg_sq):

- r has logarithmic codes: 0 is exactly 0, and 1 to 255 are spaced evenly in log r between the block's
  smallest r above 0 and its largest, so no second moment is ever rounded to 0 and every one has the same
  relative error.
  It is rounded stochastically, unbiased in r: r moves by at most 0.05% a step where gradients shrink, far
  less than a code's spacing of 1 to 7%, and rounding to nearest would stand still.
- exp_avg is kept as its quotient by r, linear codes from -127 to 127 with one scale a block. That quotient is
  bounded (by (1 - beta1) / sqrt(1 - beta2), 3.2, in exact arithmetic), so an element's step is precise to
  about a hundredth of the rate however small its gradient is beside its block's largest. It is rounded
  stochastically as well: to nearest, codes up to 5 would not decay, and a weight whose gradients have stopped
  would go on for ever.

A step is taken from moments in float32, before they are rounded. Random bits are a hash of (seed, stream of
the parameter, element): neither other parameters nor the order of the work change them.

Legend: n elements of a parameter, b = n / 256 blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from locus_kernels.sample.reference import stream, wrap

BLOCK = 256  # elements that share a scale
LEAST = 4096  # elements from which on a parameter has 8-bit moments
# Smallest share of a block's largest r that has a code of its own; what is below takes the same code
NARROW = 1e-8
STEPS = 254  # of the logarithmic codes, from 1 to 255
LARGEST = 127.0  # code of exp_avg / r
# Elements worked on at a time: the float32 temporaries of more would be seen in a step's peak memory
CHUNK = 2**16

# A finaliser of 32-bit integers with low bias (Mueller and Wellons, "hash-prospector", 2018)
HASH_A, HASH_B, WORD = 0x7FEB352D, 0x846CA68B, 0xFFFFFFFF


State = dict[str, Tensor]  # of a parameter, see `op.new_state`


class Scalars(NamedTuple):
    """Numbers that a step reads on the device; float32."""

    lr: Sequence[Tensor]  # [] for each parameter
    gradient_scale: Tensor  # []
    corrections: Tensor  # [parameters, 2]: 1 - beta**step for both betas


class Settings(NamedTuple):
    """Numbers of a step that the host knows."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def has_blocks(parameter: Tensor) -> bool:
    """Whether a parameter's moments are kept in 8 bits: it is large enough, and in whole blocks."""
    return parameter.numel() >= LEAST and parameter.numel() % BLOCK == 0


def key(seed: int, parameter: int) -> tuple[int, int]:
    """Two 32-bit words, as integers, that tell the random bits of one parameter's step from all others."""
    mixed = stream(wrap(stream(seed) + parameter)) % 2**64
    return mixed & WORD, mixed >> 32


def random_bits(words: tuple[int, int], first: int, count: int, device: torch.device) -> Tensor:
    """int64 [count] in [0, 2**32) for the elements from `first` on: a hash of the words and each element's
    number."""
    x = (torch.arange(first, first + count, device=device) & WORD) ^ words[0]
    for word in (words[1], words[0]):
        x = (x ^ (x >> 16)) * HASH_A & WORD
        x = (x ^ (x >> 15)) * HASH_B & WORD
        x = (x ^ (x >> 16)) ^ word
    return x


def round_to_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """float32 to one of its two bfloat16 neighbours, the nearer the likelier, so that it is right on
    average. NaN stays NaN: added to the pattern of a GPU's, 0x7fffffff, the bits would make it -0.

    bits: int64 in [0, 2**16), of the value's shape.
    """
    raised = value.view(torch.int32) + bits.to(torch.int32)
    rounded = (raised & -65536).view(torch.float32)
    return torch.where(value.isnan(), value, rounded).to(torch.bfloat16)


def second_draw(bits: Tensor) -> Tensor:
    """int64 in [0, 2**16) of random bits, int64 in [0, 2**32): uniform given either half of them."""
    return ((bits ^ (bits >> 15)) * HASH_A & WORD) >> 16


def quantize(
    exp_avg: Tensor, root: Tensor, draws: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Both moments in 8 bits. exp_avg, root = sqrt(exp_avg_sq): float32 [b, 256]; draws: of each, [b, 256]
    in [0, 1).

    Returns ((codes int8 [b, 256], scale float32 [b]), (codes uint8 [b, 256], low and high float32 [b])).
    """
    high = root.amax(1, keepdim=True)
    low = root.masked_fill(root == 0, torch.inf).amin(1, keepdim=True)
    low = torch.maximum(torch.minimum(low, high), high * NARROW)
    spacing = _spacing(low, high)
    below = ((root / torch.where(low > 0, low, 1)).clamp(min=1).log2() / spacing).floor().clamp(max=STEPS - 1)
    under, over = low * (below * spacing).exp2(), low * ((below + 1) * spacing).exp2()
    up = draws[1] * (over - under) < root - under
    codes = torch.where(root > 0, below + 1 + up, 0)
    kept = _root(codes, low, high)
    quotient = torch.where(kept > 0, exp_avg / torch.where(kept > 0, kept, 1), 0)
    scale = quotient.abs().amax(1, keepdim=True)
    share = quotient.abs() * (LARGEST / scale.clamp(min=torch.finfo(torch.float32).tiny))
    parts = (quotient.sign() * (share + draws[0]).floor().clamp(max=LARGEST)).to(torch.int8)
    return (parts, scale[:, 0]), (codes.to(torch.uint8), low[:, 0], high[:, 0])


def _spacing(low: Tensor, high: Tensor) -> Tensor:
    """Of two neighbouring codes, in log2; above 0 where all r are one."""
    ratio = torch.where(low > 0, high / torch.where(low > 0, low, 1), 1)
    return (ratio.log2() / STEPS).clamp(min=2**-40)


def _root(codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.where(codes > 0, low * ((codes - 1) * _spacing(low, high)).exp2(), 0)


def dequantize(state: State) -> tuple[Tensor, Tensor]:
    """(exp_avg, exp_avg_sq), float32 of the parameter's shape, of a state as `op.new_state` makes it."""
    if "exp_avg" in state:
        return state["exp_avg"], state["exp_avg_sq"]
    shape = state["exp_avg_codes"].shape
    exp_avg, root = _moments(state, slice(None))
    return exp_avg.view(shape), root.square().view(shape)


def _moments(state: State, blocks: slice) -> tuple[Tensor, Tensor]:
    """(exp_avg, root), float32 [b, 256] of some blocks."""
    codes, parts = (state[name].view(-1, BLOCK)[blocks] for name in ("exp_avg_sq_codes", "exp_avg_codes"))
    low, high, scale = (
        state[name][blocks, None] for name in ("exp_avg_sq_low", "exp_avg_sq_high", "exp_avg_scale")
    )
    root = _root(codes.float(), low, high)
    return parts.float() * (scale / LARGEST) * root, root


def step(
    parameter: Tensor,
    gradient: Tensor,
    state: State,
    scalars: tuple[Tensor, Tensor, Tensor],
    settings: Settings,
    words: tuple[int, int],
) -> None:
    """One step of one parameter, in place, in chunks. scalars: of this parameter, the rate [], the gradient's
    scale [] and the corrections [2], see `Scalars`."""
    lr, gradient_scale, corrections = scalars
    beta1, beta2, eps, weight_decay = settings
    flat, slopes = parameter.view(-1), gradient.reshape(-1)
    for first in range(0, len(flat), CHUNK):
        chosen = slice(first, first + CHUNK)
        blocks = slice(first // BLOCK, (first + CHUNK) // BLOCK)
        slope = torch.where(gradient_scale == 0, 0, slopes[chosen].float() * gradient_scale)
        if "exp_avg" in state:
            exp_avg, exp_avg_sq = (state[name].view(-1)[chosen] for name in ("exp_avg", "exp_avg_sq"))
            root = exp_avg_sq.sqrt()
        else:
            exp_avg, root = (moment.view(-1) for moment in _moments(state, blocks))
            exp_avg_sq = root.square()
        exp_avg = exp_avg * beta1 + slope * (1 - beta1)
        exp_avg_sq = exp_avg_sq * beta2 + slope.square() * (1 - beta2)
        root = exp_avg_sq.sqrt()
        value = flat[chosen].float() * (1 - lr * weight_decay)
        value = value - lr * (exp_avg / corrections[0]) / (root / corrections[1].sqrt() + eps)
        bits = random_bits(words, first, len(value), value.device)
        flat[chosen] = round_to_bfloat16(value, bits & 0xFFFF) if flat.dtype == torch.bfloat16 else value
        if "exp_avg" in state:
            state["exp_avg"].view(-1)[chosen] = exp_avg
            state["exp_avg_sq"].view(-1)[chosen] = exp_avg_sq
        else:
            _store(state, blocks, exp_avg.view(-1, BLOCK), root.view(-1, BLOCK), bits.view(-1, BLOCK))


def _store(state: State, blocks: slice, exp_avg: Tensor, root: Tensor, bits: Tensor) -> None:
    draws = second_draw(bits).float() / 65536, (bits >> 16).float() / 65536
    (parts, scale), (codes, low, high) = quantize(exp_avg, root, draws)
    state["exp_avg_codes"].view(-1, BLOCK)[blocks] = parts
    state["exp_avg_sq_codes"].view(-1, BLOCK)[blocks] = codes
    for name, value in (("exp_avg_scale", scale), ("exp_avg_sq_low", low), ("exp_avg_sq_high", high)):
        state[name][blocks] = value


def adamw8bit_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    scalars: Scalars,
    settings: Settings,
    words: Sequence[tuple[int, int]],
) -> None:
    """What `op.adamw8bit_` documents, without the counting of steps. words: of each parameter, see `key`."""
    for i, (parameter, gradient, state) in enumerate(zip(parameters, gradients, states, strict=True)):
        own = (scalars.lr[i], scalars.gradient_scale, scalars.corrections[i])
        step(parameter, gradient, state, own, settings, words[i])


# --------------------------------------------------------------------------------- states of other optimizers
def dynamic_codes(signed: bool) -> Tensor:
    """The 256 values, ascending, that "dynamic" 8-bit states stand for (Dettmers et al., arXiv 2110.02861,
    section 2.1, without an inverse for the largest): seven decades, each the middles of equal parts of [0.1,
    1], the parts doubling from decade to decade; 0; and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        middles = (10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        values += middles + [-value for value in middles if signed]
    return torch.tensor(sorted(values))


def from_dynamic_codes(
    exp_avg: tuple[Tensor, Tensor], exp_avg_sq: tuple[Tensor, Tensor], block: int = BLOCK
) -> State:
    """The state whose moments are nearest to those of "dynamic" codes, as torchao's AdamW8bit keeps them.

    Each moment: (codes uint8 of the parameter's shape, scale float32 [n / block]). Where the second moment
    was rounded to 0 and the first was not, it is taken to be half the smallest code.
    """
    shape = exp_avg[0].shape
    first, second = (
        (dynamic_codes(signed).to(codes.device)[codes.long()].view(-1, block) * scale[:, None]).view(
            -1, BLOCK
        )
        for (codes, scale), signed in ((exp_avg, True), (exp_avg_sq, False))
    )
    smallest = (
        (dynamic_codes(False)[1].item() / 2 * exp_avg_sq[1])[:, None].expand(-1, block).reshape(-1, BLOCK)
    )
    second = torch.where((second == 0) & (first != 0), smallest, second)
    (parts, scale), (codes, low, high) = quantize(first, second.sqrt(), (torch.full_like(first, 0.5),) * 2)
    return {
        "exp_avg_codes": parts.view(shape),
        "exp_avg_scale": scale,
        "exp_avg_sq_codes": codes.view(shape),
        "exp_avg_sq_low": low,
        "exp_avg_sq_high": high,
    }
