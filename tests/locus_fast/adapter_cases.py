"""Adapters to test with: a tiny model, random adapters, prompts and replies, and peft beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from locus_fast import train
from locus_fast.config import parse
from locus_fast.model.adapters import (
    adapter_tensors,
)
from locus_fast.model.families import interleave
from locus_fast.model.packing import PromptBatch, Replies
from locus_fast.model.policy import prefill, reply_logprob
from locus_fast.model.preprocess import PatchSpec
from locus_fast.model.prompts import Prompt
from locus_fast.step.rollout import Rollout
from locus_fast.weights.checkpoint import TINY_BASE, load_model
from tests.locus_fast.run_cases import SMALL

CPU = torch.device("cpu")
GROUP, REPLY = 3, 7
SHORT = [*SMALL, "--lora", "8", "--lr", "1e-2"]
try:
    import peft
except ImportError:
    peft = None
needs_peft = pytest.mark.skipif(peft is None, reason="peft is not installed: pip install 'locus-fast[lora]'")


def tiny():
    return load_model(TINY_BASE, CPU)[0]


def scatter(model, seed: int = 0, size: float = 0.1) -> None:
    """Adapters as after training: random, so that their product is not 0."""
    rng = torch.Generator().manual_seed(seed)
    for p in adapter_tensors(model).values():
        p.data = size * torch.randn(p.shape, generator=rng)


def drawn(config, seed: int = 0, device: torch.device = CPU) -> tuple[list[Prompt], PromptBatch, Replies]:
    """Two prompts with an image each, of different sizes, and GROUP random replies to each."""
    rng = torch.Generator().manual_seed(seed)
    vision, image = config.vision_config, config.image_token_id
    spec = PatchSpec(
        vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, (0.5,) * 3, (0.3,) * 3
    )
    prompts = []
    for rows, columns in ((4, 6), (2, 8)):
        cells = (rows // vision.spatial_merge_size, columns // vision.spatial_merge_size)
        ids, position = interleave(torch.randint(3, 200, (2, 5), generator=rng).tolist(), [cells], image)
        pixels = torch.randint(
            0, 256, (rows * columns * spec.patch**2 * 3,), generator=rng, dtype=torch.uint8
        )
        prompts.append(
            Prompt(
                ids,
                position,
                pixels,
                torch.tensor([[1, rows, columns]]),
                spec,
                torch.ones(4),
                torch.ones(4),
                "small",
                "drawn",
            )
        )
    batch = PromptBatch.of(prompts, config, device)
    ids = torch.randint(3, 200, (2 * GROUP, REPLY), generator=rng).to(device)
    lengths = torch.full((2 * GROUP,), REPLY, device=device)
    cut_off = torch.zeros(2 * GROUP, dtype=torch.bool, device=device)
    rollout = Rollout(ids, lengths, torch.zeros(2 * GROUP, REPLY, device=device), cut_off)
    return prompts, batch, Replies.of(batch, rollout.ids, [[REPLY] * GROUP] * 2, [0, 1])


def logprobs(model, seed: int = 0) -> torch.Tensor:
    _, batch, replies = drawn(model.config, seed, model.device)
    return reply_logprob(model, prefill(model, batch), replies, 1.0)[0]


def logits_by_transformers(model, seed: int = 0) -> torch.Tensor:
    """Of the first drawn prompt, by a model with transformers' own attention."""
    prompt = drawn(model.config, seed)[0][0]
    ids = prompt.ids[None]
    with torch.no_grad():
        kind = (ids == model.config.image_token_id).int()
        return model(
            input_ids=ids, pixel_values=prompt.patches, image_grid_thw=prompt.grids, mm_token_type_ids=kind
        ).logits[0]


def last_logits(model, seed: int = 0) -> torch.Tensor:
    """Of the first drawn prompt's last token, by our own pass."""
    _, batch, _ = drawn(model.config, seed)
    with torch.no_grad():
        return model.lm_head(prefill(model, batch).last_hidden)[0]


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("seconds", "_per_s"))} for line in lines]


def saved_by_peft(folder: Path, base: Path, seed: int = 0, **settings) -> Path:
    """Adapters of a plain peft model over `base`, with random values in both halves."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    where = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": where, **settings})
    )
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if ".lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=rng))
    wrapped.save_pretrained(folder)
    return folder


def by_peft(adapters: Path, base: Path, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits of the first drawn prompt's last token: plain transformers, with the adapters that plain peft
    puts on it."""
    stock = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    return logits_by_transformers(peft.PeftModel.from_pretrained(stock, str(adapters)).eval())[-1]


def opened(model: Path, *options: str, out: Path | None = Path()):
    """As a training run opens it; out None: as an evaluation does."""
    config = parse(
        ["--preset", "tiny", "--model", str(model), "--device", "cpu", "--dtype", "float32", *options]
    )
    return train.set_up(config, out).engine.model
