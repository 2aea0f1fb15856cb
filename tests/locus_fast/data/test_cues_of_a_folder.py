"""Cues of a folder of images, whose boxes are drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from locus_fast.errors import UserError
from tests.locus_fast.cue_cases import (
    all_held_out,
    cues,
    noise,
    same,
    truncate,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place in range(6):
        Image.fromarray(noise(400, 300, seed=place)).save(tmp_path / f"{place}.png")
    return tmp_path


def test_folder_gives_random_boxes_of_the_class_that_is_drawn(folder: Path) -> None:
    source = cues(folder, mix=(0.5, 0.3, 0.2), padding=(0.0, 0.0), scale=(1.0, 1.0))
    examples = [source.train(index) for index in range(300)]
    assert {
        name: Counter(e.size_class for e in examples)[name] / 300 for name in ("tiny", "small", "large")
    } == pytest.approx({"tiny": 0.5, "small": 0.3, "large": 0.2}, abs=0.1)
    bounds = {"tiny": (256, 1_200), "small": (1_200, 6_000), "large": (6_000, 30_000)}
    for example in examples:
        x1, y1, x2, y2 = map(int, example.box)
        assert 0 <= x1 < x2 <= 400
        assert 0 <= y1 < y2 <= 300
        assert min(x2 - x1, y2 - y1) >= 16
        low, high = bounds[example.size_class]
        assert low <= (x2 - x1) * (y2 - y1) <= high + 2 * (x2 - x1 + y2 - y1), (
            "up to a pixel of rounding on each side"
        )
        np.testing.assert_array_equal(example.cue, example.image[y1:y2, x1:x2])
    smallest = sum((e.box[2] - e.box[0], e.box[3] - e.box[1]) == (16, 16) for e in examples)
    assert smallest < 5, "tiny boxes are drawn large enough, not grown to the least side afterwards"


def test_folder_holds_out_images_and_gives_as_many_boxes_as_asked(folder: Path) -> None:
    source = cues(folder, held_out=20, seed=0)
    held = all_held_out(source)
    assert len(held) == 20
    assert len({example.source for example in held}) == 1
    assert len({example.box for example in held}) > 10
    trained = {source.train(index).source for index in range(100)}
    assert len(trained) == 5
    assert trained.isdisjoint({example.source for example in held})
    assert all(
        same(*pair) for pair in zip(held, all_held_out(cues(folder, held_out=20, seed=5)), strict=True)
    )


def test_folder_of_strips(tmp_path: Path) -> None:
    for place in range(3):
        Image.fromarray(noise(1_600, 20, seed=place)).save(tmp_path / f"{place}.png")
    source = cues(tmp_path, mix=(1, 1, 1))
    for example in map(source.train, range(60)):
        assert 0 <= example.box[0] < example.box[2] <= 1_600
        assert 0 <= example.box[1] < example.box[3] <= 20
        if example.size_class == "large":
            assert (example.box[2] - example.box[0]) * (example.box[3] - example.box[1]) >= 0.05 * 1_600 * 20


def test_folder_passes_over_a_bad_image(folder: Path) -> None:
    truncate(folder / "3.png")
    source = cues(folder)
    examples = [source.train(index) for index in range(60)]
    assert "3.png" not in {example.source for example in examples}
    assert any("3.png" in sentence for example in examples for sentence in example.skipped)


def test_folder_of_one_image_is_too_few(tmp_path: Path) -> None:
    Image.fromarray(noise()).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="has only 1 usable image"):
        cues(tmp_path)


def test_describe_a_folder(folder: Path) -> None:
    (folder / "notes.txt").write_text("")
    expected = (
        "6 images, random boxes, 4 boxes on 1 image held out; left out 1 file: 1 of other kinds (first: "
        "notes.txt)"
    )
    assert cues(folder).describe() == expected
