"""Log-probability of given tokens under a language-model head, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def linear_logprob(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of softmax(hidden @ weight.T / temperature).

    hidden [T, D], weight [V, D] of one floating dtype, ids int64 [T]. Returns float32 (log-prob [T], entropy [T] in nats).
    """
    logprob_TV = (hidden @ weight.T).float().div(temperature).log_softmax(-1)
    entropy = -(logprob_TV.detach().exp() * logprob_TV.detach()).sum(-1)
    return logprob_TV.gather(-1, ids[:, None])[:, 0], entropy
