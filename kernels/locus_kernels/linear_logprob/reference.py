"""Log-probabilities and entropies of given tokens under a language-model head, in plain PyTorch.

`dense` is the mathematics, differentiable by autograd, and the oracle of every faster path; it holds the
whole [T, V]. `forward` and `backward` are the CPU path: the same numbers by vocabulary chunks, so that
nothing of T * V elements exists when V is large.

    y = cap(hidden @ weight.T) / temperature,   cap(x) = softcap * tanh(x / softcap)
    log-prob = y[id] - log sum exp y,   entropy = log sum exp y - sum p y,   p = softmax(y)
    d log-prob / dy = onehot(id) - p,   d entropy / dy = -p (log p + entropy)

Legend: T tokens, V vocabulary, D hidden size, C columns of one vocabulary chunk, N chunks. g and h are the
gradients to log-prob and entropy.
Source of the soft-cap: Gemma 2 (arXiv 2408.00118), section 2. The chunked sums are the log-sum-exp merge of
Milakov and Gimelshein 2018 (arXiv 1805.02867), with the entropy's sum kept relative to the same maximum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from locus_kernels.linear_logprob.records import Saved, Scale, Slope, Wanted

CHUNK_ELEMENTS = 2**22  # of a [T, C] chunk: 16 MiB of float32, so that its few copies stay near a CPU's cache


def dense(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """(log-prob [T], entropy [T] in nats), computed in the dtype of hidden [T, D] and weight [V, D] up to the
    logits, then in at least float32.

    ids int [T] in [0, V). This is what a careful trainer writes without a kernel, and with float64 inputs it
    is the truth.
    """
    logits_TV = hidden @ weight.T
    y_TV = scale_logits(logits_TV.to(compute_dtype(hidden.dtype)), Scale(temperature, softcap))
    logprob_TV = y_TV.log_softmax(-1)
    entropy_T = -(logprob_TV.exp() * logprob_TV).sum(-1)
    return logprob_TV.gather(-1, ids.long()[:, None])[:, 0], entropy_T


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale_logits(logits: Tensor, scale: Scale) -> Tensor:
    """Raw logits of any shape to y."""
    cap = scale.softcap
    return (logits if cap is None else cap * torch.tanh(logits / cap)) / scale.temperature


def chunks(rows: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of the vocabulary chunks for this many rows: all of it where rows * vocabulary is
    small."""
    width = min(vocabulary, max(128, CHUNK_ELEMENTS // max(rows, 1)))
    return ((start, min(start + width, vocabulary)) for start in range(0, vocabulary, width))


# ---------------------------------------------------------------------------------------------------- forward
def forward(hidden: Tensor, weight: Tensor, ids: Tensor, scale: Scale) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob [T], entropy [T], both in `compute_dtype`; log-sum-exp of y float64 [T]). An id outside [0,
    V) has log-prob NaN."""
    logprob, entropy, lse = unrounded(hidden, weight, ids, scale)
    dtype = compute_dtype(hidden.dtype)
    return logprob.to(dtype), entropy.to(dtype), lse


def unrounded(hidden: Tensor, weight: Tensor, ids: Tensor, scale: Scale) -> tuple[Tensor, Tensor, Tensor]:
    """`forward`'s three vectors in float64. Products, exponentials and their sums over a chunk run in
    `compute_dtype`, but what is left of a row does not: a log-sum-exp rounded to float32 would shift all of
    its probabilities alike."""
    dtype = compute_dtype(hidden.dtype)
    states_TD, ids = hidden.to(dtype), ids.long()
    target_T = hidden.new_full((len(hidden),), torch.nan, dtype=dtype)
    partials: list[tuple[Tensor, Tensor, Tensor]] = []
    for start, stop in chunks(len(hidden), len(weight)):
        y_TC = scale_logits(states_TD @ weight[start:stop].to(dtype).T, scale)
        inside_T = (ids >= start) & (ids < stop)
        column_T = (ids - start).clamp(0, stop - start - 1)
        target_T = torch.where(inside_T, y_TC.gather(-1, column_T[:, None])[:, 0], target_T)
        maximum_T = y_TC.amax(-1)
        y_TC -= maximum_T[:, None]
        exponential_TC = y_TC.exp()
        total_T, weighted_T = exponential_TC.sum(-1), y_TC.mul_(exponential_TC).sum(-1)
        partials.append((maximum_T.double(), total_T.double(), weighted_T.double()))
    maximum_NT, total_NT, weighted_NT = (torch.stack(part) for part in zip(*partials, strict=True))
    maximum_T = maximum_NT.amax(0)
    shift_NT = maximum_NT - maximum_T
    total_T = (total_NT * shift_NT.exp()).sum(0)
    weighted_T = ((weighted_NT + shift_NT * total_NT) * shift_NT.exp()).sum(0)
    lse_T = maximum_T + total_T.log()
    return target_T - lse_T, total_T.log() - weighted_T / total_T, lse_T


# --------------------------------------------------------------------------------------------------- backward
def backward(
    slope: Slope, hidden: Tensor, weight: Tensor, ids: Tensor, saved: Saved, scale: Scale, wanted: Wanted
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [T, D] and weight [V, D] in their dtype, from those of log-prob and entropy; one
    not wanted is an empty tensor.

    Rows whose two gradients are 0 are left out of the work. Sums over the vocabulary run in `compute_dtype`.
    """
    if hidden.device.type == "cpu":  # looking at values costs no synchronisation here
        active_T = slope.logprob != 0
        if slope.entropy is not None:
            active_T = active_T | (slope.entropy != 0)
        if not active_T.all():
            h_T = None if slope.entropy is None else slope.entropy[active_T]
            kept = Saved(*(t[active_T] for t in saved))
            rows = (hidden[active_T], weight, ids[active_T])
            part, grad_weight = backward(Slope(slope.logprob[active_T], h_T), *rows, kept, scale, wanted)
            if wanted.hidden:
                part = hidden.new_zeros(hidden.shape).index_put((active_T,), part)
            return part, grad_weight
    dtype = compute_dtype(hidden.dtype)
    states_TD = hidden.to(dtype)
    grad_states_TD = states_TD.new_zeros(hidden.shape if wanted.hidden else (0,))
    grad_weight = weight.new_empty(weight.shape if wanted.weight else (0,))
    for start, stop in chunks(len(hidden), len(weight)):
        rows_CD = weight[start:stop].to(dtype)
        gradient_TC = logit_gradient(states_TD @ rows_CD.T, start, slope, ids, saved, scale)
        if wanted.hidden:
            grad_states_TD.addmm_(gradient_TC, rows_CD)
        if wanted.weight:
            grad_weight[start:stop] = gradient_TC.T @ states_TD
    return grad_states_TD.to(hidden.dtype), grad_weight


def logit_gradient(
    logits: Tensor, start: int, slope: Slope, ids: Tensor, saved: Saved, scale: Scale
) -> Tensor:
    """d loss / d logits of the columns [start, start + C): logits [T, C] are raw, before soft-cap and
    temperature.

    lse is float64; what it loses in the dtype of the logits is made up for by a factor a row.
    """
    rounded_T = saved.lse.to(logits.dtype)
    rest_T = (saved.lse - rounded_T).to(logits.dtype)
    logp_TC = scale_logits(logits, scale) - rounded_T[:, None]
    gradient_TC = logp_TC.exp()
    g_T1 = (slope.logprob * (-rest_T).exp())[:, None]
    if slope.entropy is None:
        gradient_TC *= -g_T1
    else:
        h_T1, shift_T1 = (slope.entropy * (-rest_T).exp())[:, None], (saved.entropy - rest_T)[:, None]
        gradient_TC *= logp_TC.add_(shift_T1).mul_(-h_T1).sub_(g_T1)
    inside_T = (ids >= start) & (ids < start + logits.shape[1])
    column_T = (ids - start).clamp(0, logits.shape[1] - 1)
    gradient_TC.scatter_add_(1, column_T[:, None], (inside_T * slope.logprob)[:, None])
    if scale.softcap is not None:
        gradient_TC *= 1 - torch.tanh(logits / scale.softcap).square()
    return gradient_TC.div_(scale.temperature)
