"""What a reply may say, and what ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from locus_kernels.box_reward import CLOSED, START, TokenTable, closing_table
from torch import Tensor

from locus_fast.errors import UserError
from locus_fast.model.families import family_of


@dataclass(frozen=True)
class Vocabulary:
    """Which ids a reply may hold, and what ends it: a stop id, or that it has said what the reader looks
    for."""

    allowed: Tensor  # bool [V]
    stops: Tensor  # int64 [stops]
    closing: Tensor | None = None  # int16 [V, states], see `closing_table`
    start: int = START  # the state in which a reply starts

    @staticmethod
    def of(
        model: Any,
        tokenizer: Any,
        table: TokenTable | None = None,
        which: str = "first",
        opening: Sequence[int] = (),
    ) -> Vocabulary:
        """Rows past the tokenizer and vision tokens are never drawn: a placeholder in a reply would be taken
        for an image that is not there.

        table, which: replies end with the box that `box_reward` counts; without a table only with a stop id.
        opening: ids that the prompt has written of the reply already.
        """
        config, rows = model.config, model.lm_head.weight.shape[0]
        allowed = torch.arange(rows) < len(tokenizer)
        vision = ("video_token_id", "vision_start_token_id", "vision_end_token_id")
        for name in (family_of(config).placeholder, *vision):
            if (token := getattr(config, name, None)) is not None:
                allowed[token] = False
        stated = model.generation_config.eos_token_id
        stops = (
            [tokenizer.eos_token_id] if stated is None else stated if isinstance(stated, list) else [stated]
        )
        if None in stops:
            raise UserError(
                "neither the model's generation_config.json nor its tokenizer names an end-of-sequence "
                "token: name it in one of them, or a reply could not end."
            )
        device, closing, start = model.lm_head.weight.device, None, START
        if table is not None:
            closing = closing_table(table, which)
            for token in opening:
                start = int(closing[token, start])
            if start == CLOSED:
                said = tokenizer.decode(list(opening))
                raise UserError(
                    f"--answer-prefix: {said} has said the whole box already: leave it open, such as [ alone."
                )
            closing = closing.to(device)
        return Vocabulary(allowed.to(device), torch.tensor(stops, device=device), closing, start)
