"""The embedded default: drawn scenes, the tokenizer, the base that ships and the script that makes it."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from locus_fast import train
from locus_fast.tiny import base
from locus_fast.tiny.branches import REPLY_LENGTH, Task, box_cells, branch_mask, draw_branches, loosened
from locus_fast.tiny.scenes import IMAGE_SIZES, OBJECTS, SceneCues, draw_scene
from locus_fast.tiny.tokenizer import build_tokenizer
from locus_fast.weights.checkpoint import TINY_BASE, load_model


@pytest.mark.parametrize("seed", range(20))
def test_scenes_hold_separate_objects(seed: int) -> None:
    size = IMAGE_SIZES[seed % len(IMAGE_SIZES)]
    scene, boxes = draw_scene(np.random.default_rng(seed), size, OBJECTS)
    assert scene.shape == (size[1], size[0], 3)
    assert OBJECTS[0] <= len(boxes) <= OBJECTS[1]
    covered = np.zeros(scene.shape[:2], int)
    for x1, y1, x2, y2 in boxes:
        assert 0 <= x1 < x2 <= size[0]
        assert 0 <= y1 < y2 <= size[1]
        covered[y1:y2, x1:x2] += 1
    assert covered.max() == 1


def test_scenes_are_a_function_of_seed_and_index() -> None:
    cues = SceneCues(seed=3, held_out=10)
    straight = [cues.train(i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        mixed = dict(zip(range(11, -1, -1), pool.map(cues.train, range(11, -1, -1)), strict=True))
    for i, example in enumerate(straight):
        assert np.array_equal(example.image, mixed[i].image)
        assert np.array_equal(example.cue, mixed[i].cue)
        assert example.box == mixed[i].box
    assert not np.array_equal(straight[0].image, SceneCues(4, 10).train(0).image)
    assert np.array_equal(cues.held_out(5).image, SceneCues(99, 10).held_out(5).image)
    assert len({example.image.shape for example in straight}) >= 3


def test_the_cue_shows_the_box() -> None:
    for i in range(20):
        example = SceneCues(0, 1).train(i)
        x1, y1, x2, y2 = map(int, example.box)
        region = example.image[y1:y2, x1:x2]
        assert abs(region.mean((0, 1)) - example.cue.mean((0, 1))).max() < 12
        assert example.size_class in ("tiny", "small", "large")


def test_a_reply_is_fourteen_tokens() -> None:
    task = Task.of(build_tokenizer())
    reply = task.reply((0.0, 56.0, 160.0, 112.0), (160, 112))
    assert len(reply) == REPLY_LENGTH
    assert task.tokenizer.decode(reply) == "[00, 50, 99, 99]<|im_end|>"


def test_branches_see_the_image_and_themselves() -> None:
    real = torch.ones(1, 3 + 2 * 2, dtype=torch.bool)
    real[0, 3] = False  # padding in front of the first branch
    seen = branch_mask(real, shared=3, width=2)[0, 0] == 0
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 1, 1],
    ]
    assert seen.int().tolist() == expected


def test_cells_of_a_box() -> None:
    inside, edges = box_cells(torch.tensor([20.0, 0.0, 40.0, 16.0]), grid_h=2, grid_w=4)
    assert inside.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert edges.tolist() == [
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0, 0],
    ]


def test_loosened_boxes_hold_the_box() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        x1, y1, x2, y2 = loosened(rng, (40, 30, 60, 50), (160, 112), 2.2)
        assert x1 <= 40
        assert y1 <= 30
        assert x2 >= 60
        assert y2 >= 50
        assert 1 <= (x2 - x1) * (y2 - y1) / 400 <= 2.2**2 + 1e-9
    assert loosened(rng, (1, 2, 3, 4), (160, 112), 1.0) == (1, 2, 3, 4)


def test_what_ships() -> None:
    assert sum(file.stat().st_size for file in TINY_BASE.iterdir()) < 8 * 2**20
    model, tokenizer = load_model(TINY_BASE, torch.device("cpu"))
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 3e6
    assert model.config.model_type == "qwen3_vl"
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_the_script_makes_a_base_that_trains(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(base, "SCENES", 2)
    monkeypatch.setattr(base, "CUES", 2)
    found = tmp_path / "found.safetensors"
    arguments = [
        "base",
        "--found",
        str(found),
        "--find-steps",
        "3",
        "--loosen-steps",
        "1",
        "--out",
        str(tmp_path / "base"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    base.main()
    assert {file.name for file in (tmp_path / "base").iterdir()} == {
        file.name for file in TINY_BASE.iterdir()
    }
    assert found.exists()
    options = [
        "--model",
        str(tmp_path / "base"),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "1",
        "--prompts",
        "2",
        "--eval-cues",
        "4",
    ]
    assert train.main(options) == 0


def test_branches_fit_the_model() -> None:
    task = Task.of(build_tokenizer())
    batch = draw_branches(np.random.default_rng(1), task, 2, 3, OBJECTS, 1.0)
    assert int(batch.is_image.sum()) == batch.patches.shape[0] // 4 == int(batch.grids.prod(1).sum()) // 4
    assert (batch.target.view(2, 3, REPLY_LENGTH)[..., -1] == task.stop).all()
    assert batch.cells_of_box.sum(-1).min() >= 1
    assert batch.cells_of_edge.sum(-1).min() >= 1
