"""What a run may use of its device: planned from the model's shape and the free memory before any weight is
loaded, and what to say where it does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from locus_fast.config import Config
from locus_fast.cost.memory import MemorySettings
from locus_fast.cost.plan import AUTO_CHECKPOINTING, TEXT_TOKENS, Plan, plan, unplanned
from locus_fast.cost.shapes import Group, ModelShape, Trained, group_of
from locus_fast.cost.traffic import STATE_BYTES
from locus_fast.errors import UserError
from locus_fast.step.optimizers import default_optimizer

LARGER = "take a larger device, a smaller --model, a smaller --group-size or smaller --image-pixels"
RANK = 16  # of the adapters that are proposed where nothing else fits
SHORTEST = 40  # tokens that a proposal leaves a reply: a box, said without thinking


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a CUDA device; None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def trained_by(config: Config) -> Trained:
    """What a run trains."""
    return Trained.adapters(config.lora) if config.lora else Trained(*(rate > 0 for rate in config.lr_scale))


def state_bytes(config: Config, kind: torch.dtype) -> float:
    """Bytes of optimizer state of a parameter of this type."""
    return {"adamw": 8, "adamw-master": 12}.get(default_optimizer(config.optimizer, kind), STATE_BYTES)


def plan_for(config: Config, shape: ModelShape, kind: torch.dtype, device: torch.device) -> Plan:
    """The plan of a training run of a model of this shape and type of weights, from the device's free memory.

    Prompts are taken to be between the fewest and the most pixels that an image and its cue may have, and
    replies as long as they may be. Raises UserError if one does not fit, which names the largest setting that
    does.
    """
    memory = free_memory(device)
    if memory is None:
        return unplanned(config.microbatch_tokens, config.checkpointing)
    try:
        return planned(config, shape, kind, memory)
    except UserError as error:
        raise UserError(
            f"{error}; {remedy(config, lambda changed: is_planned(changed, shape, kind, memory))}."
        ) from None


def is_planned(config: Config, shape: ModelShape, kind: torch.dtype, memory: int) -> bool:
    """Whether there is a plan for a run, see `planned`."""
    try:
        planned(config, shape, kind, memory)
    except UserError:
        return False
    return True


def check_rank(config: Config, shape: ModelShape) -> None:
    """Raises UserError for adapters that are wider than the model: they would hold no more than the weights
    do."""
    if config.lora > (width := shape.text.hidden):
        raise UserError(
            f"--lora {config.lora}: the language model is {width:,} wide; give a rank of at most that, such "
            f"as {RANK}."
        )


def planned(
    config: Config, shape: ModelShape, kind: torch.dtype, memory: int, fused: bool | None = None
) -> Plan:
    """The plan of a run of a model of this shape and type of weights in so many bytes. fused: with
    liger-kernel's operators; None: as a CUDA device has them here."""
    return plan(
        shape,
        extremes(config, shape),
        memory_bytes=memory,
        prompts=config.prompts,
        tokens=config.microbatch_tokens,
        checkpointing=config.checkpointing,
        rollout_tokens=config.rollout_tokens,
        how=memory_settings(config, kind, fused),
    )


def extremes(config: Config, shape: ModelShape) -> list[Group]:
    """The largest and the smallest prompt of a run, with the longest replies."""
    pixels = config.image_pixels, config.cue_pixels
    return [
        group_of(
            shape,
            [(round(math.sqrt(bounds[end])),) * 2 for bounds in pixels],
            pixels,
            text_tokens=TEXT_TOKENS,
            replies=config.group_size,
            reply_tokens=config.max_new_tokens,
        )
        for end in (1, 0)
    ]


def memory_settings(config: Config, kind: torch.dtype, fused: bool | None = None) -> MemorySettings:
    """How a run's settings hold its memory. fused: as in `planned`."""
    if fused is None:
        from locus_fast.model.fused import can_fuse  # with transformers

        fused = can_fuse(torch.device("cuda"))
    held = "copy" if config.reference == "auto" else config.reference
    moved = torch.float32 if config.lora else kind  # the type of what is trained
    return MemorySettings(
        reference=held if config.kl_coef else "none",
        trained=trained_by(config),
        quantised=config.quantize != "off",
        max_tokens=config.max_new_tokens,
        fused=fused,
        weight_bytes=kind.itemsize,
        gradient_bytes=moved.itemsize,
        state_bytes=state_bytes(config, moved),
        width=kind.itemsize,
    )


def remedy(config: Config, fits: Callable[[Config], bool], spoken: int = 0) -> str:
    """Words that name the largest setting that fits, where a run as asked for does not: given besides what
    was asked for, they fit.

    fits: whether settings do, whose budgets are to be chosen (`--microbatch-tokens 0`); spoken: the tokens of
    a reply that the cost command asks about, which no allowed length may be below.
    """
    for words, changed in remedies(config):
        low, high = 0, changed.max_new_tokens + 1
        while high - low > 1:  # replies may be `low` tokens long, and not `high`
            middle = changed.max_new_tokens if high > changed.max_new_tokens else (low + high) // 2
            low, high = (middle, high) if fits(replace(changed, max_new_tokens=middle)) else (low, middle)
        if low >= min(SHORTEST, config.max_new_tokens):
            shorter = [f"--max-new-tokens {low}"] * (low < config.max_new_tokens)
            shorter += [f"--reply-tokens {low}"] * (low < spoken)
            return f"this fits: {' '.join([*words, *shorter])}"
    return LARGER


def remedies(config: Config) -> Iterator[tuple[list[str], Config]]:
    """(options, configuration with them) that take less and less memory: budgets to be chosen, recomputation,
    references in fewer bytes and none, adapters. Options that were given and do not go with these are taken
    back."""
    words: list[str] = []
    if config.microbatch_tokens:
        words, config = [*words, "--microbatch-tokens 0"], replace(config, microbatch_tokens=0)
    if config.rollout_tokens:
        words, config = [*words, "--rollout-tokens 0"], replace(config, rollout_tokens=0)
    if config.checkpointing not in (AUTO_CHECKPOINTING, 1):
        words, config = [*words, "--checkpointing 1"], replace(config, checkpointing=1)
    yield words, config
    if not config.lora:
        for kind in ("int8", "nf4", "host") if config.kl_coef > 0 else ():
            yield [*words, f"--reference {kind}"], replace(config, reference=kind)
        if config.kl_coef > 0:
            yield [*words, "--kl-coef 0"], replace(config, kl_coef=0.0)
        words, config = [*words, f"--lora {RANK}"], replace(config, lora=RANK)
        if config.reference != "auto":
            words, config = [*words, "--reference auto"], replace(config, reference="auto")
        if config.optimizer != "auto":
            words, config = [*words, "--optimizer auto"], replace(config, optimizer="auto")
        yield words, config
    if config.quantize == "off":
        yield [*words, "--quantize nf4"], replace(config, quantize="nf4")
