"""What the main job promises, minutes long: `python -m pytest -m slow`. It gains held-out IoU for three
seeds, and from the reward alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from locus_kernels.box_reward import box_reward, group_advantage

from locus_fast import train
from locus_fast.step import scoring

pytestmark = pytest.mark.slow


def gain(out: Path) -> float:
    held_out = json.loads((out / "summary.json").read_text())["eval"]
    assert held_out["before"]["n"] >= 256
    assert 0.15 <= held_out["before"]["mean_iou"] <= 0.45
    return held_out["after"]["mean_iou"] - held_out["before"]["mean_iou"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_main_job_learns(seed: int, tmp_path: Path) -> None:
    assert train.main(["--out", str(tmp_path / "run"), "--seed", str(seed)]) == 0
    assert gain(tmp_path / "run") >= 0.10


def test_8_bit_states_end_where_float32_ones_do(tmp_path: Path) -> None:
    ends = []
    for optimizer in ("adamw", "adamw8bit"):
        assert train.main(["--out", str(tmp_path / optimizer), "--seed", "3", "--optimizer", optimizer]) == 0
        ends.append(gain(tmp_path / optimizer))
    assert ends[0] == pytest.approx(ends[1], abs=0.02)


def test_permuted_rewards_teach_nothing(tmp_path: Path, monkeypatch) -> None:
    """The control: each group's rewards dealt out among its replies at random. Everything else, the spread of
    advantages included, is the same."""
    shuffle = torch.Generator().manual_seed(0)

    def permuted(*arguments, **options):
        scored, size = box_reward(*arguments, **options), options["group_size"]
        order = torch.rand(len(scored.reward) // size, size, generator=shuffle).argsort(1)
        reward = scored.reward.view(-1, size).gather(1, order).flatten()
        advantage, zero_variance = group_advantage(reward, size, options["normalize_std"])
        return scored._replace(reward=reward, advantage=advantage, zero_variance=zero_variance)

    monkeypatch.setattr(scoring, "box_reward", permuted)
    assert train.main(["--out", str(tmp_path / "run")]) == 0
    assert gain(tmp_path / "run") < 0.03
