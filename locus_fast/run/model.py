"""The model of a run: on which device, by which plan, with which adapters, quantised or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from locus_fast.config import Config
from locus_fast.cost.plan import Plan, unplanned
from locus_fast.errors import UserError
from locus_fast.model.adapters import add_adapters, keep_adapters, merge_adapters, train_further
from locus_fast.model.attention import use_attention
from locus_fast.model.families import shape_of
from locus_fast.model.quantize import quantize
from locus_fast.run.disk import check_disk
from locus_fast.run.plan import check_rank, plan_for
from locus_fast.weights.checkpoint import load_source, weight_dtype
from locus_fast.weights.finite import first_not_finite
from locus_fast.weights.source import Source

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """The device of this name; auto is CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def plan_run(config: Config, source: Source, device: torch.device, out: Path | None) -> Plan:
    """The plan of a training run into the folder `out`, None to evaluate alone. Raises UserError if the
    weights are of a type that is not trained, or if the disk or the device has no room."""
    if out is None:
        return unplanned(config.microbatch_tokens, config.checkpointing)
    kind = weight_dtype(source.folder, source.config, DTYPES[config.dtype])
    if kind not in DTYPES.values():
        stored = str(kind).removeprefix("torch.")
        raise UserError(
            f"{source.folder}: its weights are {stored}, in which small updates are lost: give --dtype "
            "bfloat16 or --dtype float32."
        )
    shape = shape_of(source.config)
    check_rank(config, shape)
    check_disk(config, source, kind, out)
    return plan_for(config, shape, kind, device)


def open_model(config: Config, source: Source, device: torch.device, role: str) -> Any:
    """The model on the device, quantised or with adapters to train as the settings say. role: of those of the
    source."""
    model = load_source(
        source, torch.device("cpu") if config.quantize != "off" else device, DTYPES[config.dtype]
    )
    if role == "merged":
        merge_adapters(source.adapters, model)
    if name := first_not_finite(model.named_parameters()):
        raise UserError(
            f"{source.folder}: {name} holds values that are not finite (NaN or infinite): fetch it again, "
            "or take an earlier state."
        )
    if config.quantize != "off":
        # straight from the mapped files: the device never holds the whole layers
        quantize(model, config.quantize, device)
        model.to(device)
    if role == "trained":
        train_further(model, source.adapters, anchored=config.kl_coef > 0)
    elif config.lora:
        if role == "kept":
            keep_adapters(model, source.adapters)
        add_adapters(model, config.lora, config.lora_alpha)
    try:
        use_attention(model, backend=config.attention)
    except ValueError as error:
        raise UserError(f"--attention {config.attention}: {error}.") from None
    return model
