"""Whole runs with other settings, and on files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from locus_fast import train
from locus_fast.weights.checkpoint import TINY_BASE
from tests.locus_fast.metrics_cases import timeless
from tests.locus_fast.run_cases import SMALL as SHORT


@pytest.mark.parametrize(
    "options",
    [
        [
            "--kl-coef",
            "0",
            "--loss-agg",
            "seq-mean-token-mean",
            "--normalize-std",
            "false",
            "--reward",
            "giou_plus_one",
        ],
        ["--updates-per-batch", "3", "--checkpointing", "2", "--lr", "1e-3", "--reward", "rising"],
        ["--prompt-style", "think", "--max-new-tokens", "24", "--temperature", "0.8", "--top-p", "0.9"],
        [
            "--answer-prefix",
            "[",
            "--lr-schedule",
            "cosine",
            "--attention",
            "plain",
            "--updates-per-batch",
            "2",
            "--rollout-tokens",
            "9999",
        ],
    ],
)
def test_variants_run(options: list[str], tmp_path: Path) -> None:
    assert train.main([*SHORT, "--out", str(tmp_path / "run"), *options]) == 0
    rows = timeless(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 3
    assert not any(row["dropped_step"] for row in rows)
    if "--updates-per-batch" in options and any(row["zero_variance_groups"] < 6 for row in rows):
        assert any(row["ratio_max"] > 1 for row in rows)


def test_a_frozen_vision_tower_stays_as_it_was(tmp_path: Path) -> None:
    assert (
        train.main([*SHORT, "--out", str(tmp_path / "run"), "--lr-scale", "0", "1", "0.5", "--steps", "2"])
        == 0
    )
    before, after = (
        load_file(folder / "model.safetensors") for folder in (TINY_BASE, tmp_path / "run" / "final")
    )
    frozen = [name for name in before if ".visual." in name and "merger" not in name]
    assert len(frozen) > 20
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert sum(not torch.equal(before[name], after[name]) for name in before.keys() - set(frozen)) > 20


def photographs(folder: Path) -> Path:
    """Five images of different sizes with boxes, and their COCO file."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i, (width, height) in enumerate([(200, 200), (240, 160), (220, 150), (170, 110), (300, 260)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        annotations += [
            {"id": 10 * i + k, "image_id": i, "bbox": [10 + 20 * k, 12, 18, 17], "category_id": 1}
            for k in range(5)
        ]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_training_on_files(tmp_path: Path, capsys) -> None:
    data = photographs(tmp_path)
    # cut short: skipped with a count, or never drawn
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:2000])
    arguments = [*SHORT, "--data", str(data), "--images", str(tmp_path), "--out", str(tmp_path / "run")]
    assert train.main(arguments) == 0
    assert sum(row["skipped_images"] for row in timeless(tmp_path / "run" / "metrics.jsonl")) > 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_images"] >= 1
    assert re.search(r"skipped: .*2\.png", capsys.readouterr().err)
    assert (tmp_path / "run" / "samples.png").exists()
