"""The trainer itself on the presets' models with random weights: prompts/s, MFU, peak memory and phases of
full fine-tuning with KL.

On CUDA the published sizes and the paper's recipe, five steps of 128 prompts x 8 replies on 640x480 images;
without it the same run on small models of two architectures, so that it cannot rot, and its figures mean
nothing. A random model earns nothing, so advantages are random: every group has a gradient. The last step is
timed phase by phase, the device waited for at each boundary; the others run as they do.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from locus_kernels.box_reward import box_reward, group_advantage
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from bench.roofline import DEVICE, synchronize
from locus_fast import train
from locus_fast.run import model as runtime
from locus_fast.run import saving
from locus_fast.step import scoring, step
from locus_fast.step.rollout import Decoder
from locus_fast.step.step import Step
from tests.full_sizes import SIZES, full_config
from tests.published import published_name, write_checkpoint, write_files

FULL = DEVICE == "cuda"
STEPS = 5 if FULL else 3
EPOCH = 99_500  # prompts of the paper's data
SMALL = {
    "--prompts": "4",
    "--group-size": "2",
    "--max-new-tokens": "4",
    "--microbatch-tokens": "4000",
    "--image-pixels": ("4096", "12544"),
    "--cue-pixels": ("1024", "3136"),
}
PAPER = {"--max-new-tokens": "100"}  # as long as the paper's replies are
PHASES = {  # (owner, name) -> phase
    (step, "prefill"): "prefill",
    (Decoder, "generate"): "decode",
    (scoring.Scoring, "reward"): "reward",
    (step, "reply_hidden"): "replies",
    (Step, "_backward"): "backward",
    (step, "clip_and_step"): "optimizer",
}


def write_full_checkpoint(folder: Path, preset: str) -> Path:
    """Random bfloat16 weights of the published sizes, a shard for each part or layer."""
    family = SIZES[preset][0]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(full_config(preset)))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    shapes = {
        published_name(name, family): p.shape for name, p in model.state_dict().items() if name not in tied
    }
    shards: dict[str, list[str]] = defaultdict(list)  # layer -> names
    for name in shapes:
        shards[name.partition("layers.")[2].partition(".")[0]].append(name)
    place: dict[str, str] = {}
    for index, names in enumerate(shards.values()):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        weights = {
            name: torch.randn(shapes[name], dtype=torch.bfloat16, device=DEVICE).mul_(0.02).cpu()
            for name in names
        }
        # norms
        weights |= {
            name: torch.ones_like(value)
            for name, value in weights.items()
            if value.ndim == 1 and name.endswith("weight")
        }
        save_file(weights, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(names, file)
    size = 2 * sum(shape.numel() for shape in shapes.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": place})
    )
    write_files(folder, family)
    return folder


def draw_photographs(folder: Path, count: int, width: int, height: int) -> Path:
    """Smooth random images with four boxes each, and the JSONL that lists them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        coarse = rng.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
        left, top, side = (
            rng.integers(0, width // 2, 4),
            rng.integers(0, height // 2, 4),
            rng.integers(17, height // 2, 4),
        )
        lines += [
            json.dumps({"image": f"{i}.jpg", "bbox": [int(x), int(y), int(x + n), int(y + n)]})
            for x, y, n in zip(left, top, side, strict=True)
        ]
    (folder / "boxes.jsonl").write_text("\n".join(lines))
    return folder / "boxes.jsonl"


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds of each phase of the last step, filled while it runs; and a run with random advantages that
    leaves no weights behind."""
    seconds: dict[str, float] = defaultdict(float)
    last = [False]

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if not last[0]:
                return function(*arguments, **options)
            synchronize()
            began = time.perf_counter()
            made = function(*arguments, **options)
            synchronize()
            seconds[phase] += time.perf_counter() - began
            return made

        return run

    for (owner, name), phase in PHASES.items():
        monkeypatch.setattr(owner, name, timed(phase, getattr(owner, name)))
    step_as_it_is, rewards = Step.__call__, torch.Generator().manual_seed(0)

    def call(owner: Step, prompts: Any, index: int, began: float, stop: Any) -> Any:
        last[0] = index == STEPS - 1
        return step_as_it_is(owner, prompts, index, began, stop)

    def scattered(ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        scored = box_reward(ids, *arguments, **options)
        drawn = torch.rand(len(ids), generator=rewards).to(ids.device)
        advantage, zero_variance = group_advantage(drawn, options["group_size"], True)
        return scored._replace(advantage=advantage, zero_variance=zero_variance)

    monkeypatch.setattr(Step, "__call__", call)
    monkeypatch.setattr(scoring, "box_reward", scattered)
    for owner, name in ((saving, "save_checkpoint"), (saving, "save_model"), (runtime, "check_disk")):
        monkeypatch.setattr(owner, name, lambda *_, **__: None)
    return seconds


@pytest.mark.parametrize("preset", SIZES if FULL else ["qwen2.5-vl-7b", "qwen3-vl-4b"])
def test_full_size(benchmark, preset: str, phases: dict[str, float], tmp_path: Path) -> None:
    folder = (
        write_full_checkpoint(tmp_path / "model", preset)
        if FULL
        else write_checkpoint(tmp_path / "model", SIZES[preset][0])
    )
    data = draw_photographs(tmp_path / "photographs", *((64, 640, 480) if FULL else (6, 150, 110)))
    options = {"--steps": str(STEPS), "--eval-cues": "2", "--warmup-ratio": "0", **(PAPER if FULL else SMALL)}
    words = [
        word
        for name, value in options.items()
        for word in (name, *((value,) if isinstance(value, str) else value))
    ]
    arguments = ["--model", str(folder), "--data", str(data), "--out", str(tmp_path / "run"), *words]
    if FULL:
        gc.collect()
        torch.cuda.empty_cache()  # the trainer plans with what is free
        torch.cuda.reset_peak_memory_stats()
    codes = []
    benchmark.pedantic(lambda: codes.append(train.main(arguments)), rounds=1)
    assert codes == [0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS
    assert not any(row["dropped_step"] or row["zero_variance_groups"] for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    settled = rows[1:-1]  # the first step compiles, the last is timed by phase
    summary, config = (
        json.loads((tmp_path / "run" / name).read_text()) for name in ("summary.json", "config.json")
    )
    prompts_per_s = config["prompts"] / statistics.median(row["seconds"] for row in settled)
    measured = {
        name: statistics.median(row[name] for row in settled)
        for name in ("rollouts_per_s", "unique_tokens_per_s", "wait_seconds", "flops_over_floor")
    }
    measured |= {"mfu": statistics.median(row["mfu"] for row in settled)} if "mfu" in settled[0] else {}
    benchmark.group = "five steps of full fine-tuning with KL" + ("" if FULL else ", small models")
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name() if FULL else "cpu",
        "plan": summary["plan"],
        "prompts_per_s": prompts_per_s,
        "hours_an_epoch": EPOCH / prompts_per_s / 3600,
        **measured,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if FULL else None,
        "phases_of_the_last_step": {**phases, "step": rows[-1]["seconds"]},
        "steps": rows,
    }
    share = ", ".join(f"{name} {100 * value / rows[-1]['seconds']:.0f}%" for name, value in phases.items())
    print(f"\n{preset}: {prompts_per_s:.2f} prompts/s; of the last step {share}")
