"""Cutting cues: the recipe, size classes, padding, growth, rescaling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from locus_fast.data.cues import cut_cue, size_class_of
from locus_fast.errors import UserError
from tests.locus_fast.cue_cases import RECIPE, noise, recipe

# ---- recipe and cutting


@pytest.mark.parametrize(
    "changes",
    [
        {"mix": (0, 0, 0)},
        {"mix": (1, -1, 1)},
        {"mix": (1, 1)},
        {"mix": (float("nan"), 1, 1)},
        {"min_side": 0},
        {"padding": (0.2, 0.1)},
        {"padding": (-0.1, 0.1)},
        {"scale": (0.0, 1.0)},
        {"scale": (2.0, 1.0)},
    ],
)
def test_recipe_that_makes_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        recipe(**changes)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 9.9, 10), "tiny"),
        ((0, 0, 10, 10), "small"),
        ((5, 5, 30, 25), "small"),
        ((5, 5, 30, 25.1), "large"),
        ((0, 0, 100, 100), "large"),
    ],
)
def test_size_class_by_part_of_the_area(box: tuple[float, ...], expected: str) -> None:
    assert size_class_of(box, 100, 100) == expected


def test_small_box_is_cut_as_it_is_rounded_outwards() -> None:
    image = noise()
    cue, box = cut_cue(image, (10.5, 20.0, 40.2, 50.9), "small", RECIPE, np.random.default_rng(0))
    assert box == (10.0, 20.0, 41.0, 51.0)
    assert all(type(value) is float for value in box)
    np.testing.assert_array_equal(cue, image[20:51, 10:41])
    cue[:] = 0
    np.testing.assert_array_equal(image, noise())


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((40, 30, 44, 34), (34, 24, 50, 40)),
        ((0, 0, 3, 3), (0, 0, 16, 16)),
        ((97, 78, 100, 80), (84, 64, 100, 80)),
        ((40, 0, 44, 30), (34, 0, 50, 30)),
    ],
    ids=["about its centre", "at the first corner", "at the last corner", "one side"],
)
def test_crop_grows_to_min_side(box: tuple[float, ...], expected: tuple[float, ...]) -> None:
    for kind in ("small", "tiny"):
        assert (
            cut_cue(noise(), box, kind, recipe(padding=(0.0, 0.0)), np.random.default_rng(0))[1] == expected
        )


def test_image_smaller_than_min_side_is_taken_whole() -> None:
    assert cut_cue(noise(20, 17), (3, 3, 8, 8), "small", recipe(min_side=18), np.random.default_rng(0))[
        1
    ] == (0, 0, 18, 17)


def test_tiny_box_is_padded_within_the_range() -> None:
    image = noise(400, 400)
    boxes = np.array(
        [
            cut_cue(image, (100, 200, 200, 240), "tiny", RECIPE, np.random.default_rng(seed))[1]
            for seed in range(300)
        ]
    )
    outwards = np.abs(boxes - (100, 200, 200, 240))
    assert outwards.max(axis=0).tolist() == [10, 4, 10, 4]
    assert (outwards.min(axis=0) <= 1).all()
    assert (boxes[:, :2] <= (100, 200)).all()
    assert (boxes[:, 2:] >= (200, 240)).all()
    assert abs(np.corrcoef(outwards[:, 0], outwards[:, 2])[0, 1]) < 0.2, "each side has a padding of its own"


def test_tiny_crop_is_resized_bicubically_within_the_range() -> None:
    image = noise()
    factors = []
    for seed in range(200):
        cue, (x1, y1, x2, y2) = cut_cue(image, (10, 10, 50, 50), "tiny", RECIPE, np.random.default_rng(seed))
        crop = image[int(y1) : int(y2), int(x1) : int(x2)]
        resized = Image.fromarray(crop).resize((cue.shape[1], cue.shape[0]), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(cue, np.asarray(resized))
        factors.append(cue.shape[0] / crop.shape[0])
    assert 0.78 < min(factors) < 0.85
    assert 1.95 < max(factors) < 2.02


def test_resized_cue_keeps_8_pixels_a_side() -> None:
    assert (
        cut_cue(noise(), (10, 10, 26, 60), "tiny", recipe(scale=(0.1, 0.1)), np.random.default_rng(0))[
            0
        ].shape[1]
        == 8
    )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_region_is_inside_covers_the_box_and_is_what_the_cue_shows(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(16, 90)), data.draw(st.integers(16, 90))
    x1, y1 = data.draw(st.floats(0, width - 0.5)), data.draw(st.floats(0, height - 0.5))
    x2, y2 = data.draw(st.floats(x1 + 0.25, width)), data.draw(st.floats(y1 + 0.25, height))
    kind = data.draw(st.sampled_from(["tiny", "small", "large"]))
    image = noise(width, height)
    cue, (left, top, right, bottom) = cut_cue(
        image, (x1, y1, x2, y2), kind, recipe(scale=(1.0, 1.0)), np.random.default_rng(1)
    )
    assert 0 <= left <= x1 < x2 <= right <= width
    assert 0 <= top <= y1 < y2 <= bottom <= height
    assert min(right - left, bottom - top) >= 16
    np.testing.assert_array_equal(cue, image[int(top) : int(bottom), int(left) : int(right)])
