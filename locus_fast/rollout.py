"""Sampling replies over the shared prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from locus_kernels.sample import sample
from torch import Tensor

from locus_fast.errors import UserError
from locus_fast.policy import Prefix, decode
from locus_fast.types import Rollout


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; temperature 0 is greedy."""

    replies: int
    max_tokens: int
    temperature: float
    top_p: float


@dataclass(frozen=True)
class Vocabulary:
    """Which ids a reply may hold, and which end it."""

    allowed: Tensor  # bool [V]
    stops: Tensor  # int64 [stops]

    @staticmethod
    def of(model: Any, tokenizer: Any) -> Vocabulary:
        """Rows past the tokenizer and vision tokens are never drawn: a placeholder in a reply would be taken for an image that is not there."""
        config, rows = model.config, model.lm_head.weight.shape[0]
        allowed = torch.arange(rows) < len(tokenizer)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            if (token := getattr(config, name, None)) is not None:
                allowed[token] = False
        stated = model.generation_config.eos_token_id
        stops = [tokenizer.eos_token_id] if stated is None else stated if isinstance(stated, list) else [stated]
        if None in stops:
            raise UserError("neither the model's generation_config.json nor its tokenizer names an end-of-sequence token; a reply could not end.")
        device = model.lm_head.weight.device
        return Vocabulary(allowed.to(device), torch.tensor(stops, device=device))


@torch.no_grad()
def generate(model: Any, prefix: Prefix, vocabulary: Vocabulary, sampling: Sampling, *, seed: int, groups: Sequence[int]) -> Rollout:
    """Replies of every prompt in the prefix.

    groups: the identity of each prompt in this seed's stream, so that a prompt's replies do not depend on the microbatch it fell into.
    """
    G, device = sampling.replies, prefix.last_hidden.device
    row = (torch.tensor(groups, dtype=torch.int64)[:, None] * G + torch.arange(G)).flatten().to(device)
    shape = (len(row), sampling.max_tokens)
    ids = vocabulary.stops[0].expand(shape).clone()
    logprob = torch.zeros(shape, device=device)
    lengths = torch.full((len(row),), sampling.max_tokens, dtype=torch.int64, device=device)
    running = torch.ones(len(row), dtype=torch.bool, device=device)
    steps = decode(model, prefix, G, sampling.max_tokens)
    logits = next(steps)
    for at in range(sampling.max_tokens):
        token, value = sample(
            logits, seed=seed, row=row, position=at, temperature=sampling.temperature, top_p=sampling.top_p, allowed=vocabulary.allowed
        )
        ids[:, at] = torch.where(running, token, ids[:, at])
        logprob[:, at] = torch.where(running, value, 0.0)
        stopped = running & torch.isin(token, vocabulary.stops)
        lengths = torch.where(stopped, at + 1, lengths)
        running = running & ~stopped
        if at + 1 == sampling.max_tokens or not running.any():
            break
        logits = steps.send(token)  # type: ignore[attr-defined]
    return Rollout(ids, lengths, logprob)
