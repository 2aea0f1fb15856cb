"""The file-backed source of cues: what it draws, what it holds out, and what it passes over."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from locus_fast.data.example import CueSource
from locus_fast.errors import UserError
from tests.locus_fast.cue_cases import (
    HEIGHT,
    LARGE,
    SMALL,
    TINY,
    WIDTH,
    all_held_out,
    cues,
    dataset,
    noise,
    same,
    truncate,
)

# ---- the source


def test_examples_are_a_function_of_seed_and_index(tmp_path: Path) -> None:
    path = dataset(tmp_path, [[TINY, SMALL]] * 6)
    source: CueSource = cues(path)
    again = cues(path)
    order = np.random.default_rng(0).permutation(64).tolist()
    with ThreadPoolExecutor(8) as pool:
        from_threads = dict(zip(order, pool.map(source.train, order), strict=True))
        held_from_threads = list(pool.map(source.held_out, range(source.held_out_count)))
    assert all(same(again.train(index), from_threads[index]) for index in range(64))
    assert all(same(again.held_out(index), example) for index, example in enumerate(held_from_threads))
    other = cues(path, seed=1)
    assert sum(same(other.train(index), from_threads[index]) for index in range(64)) < 16
    assert len({(e.source, e.box, e.cue.shape) for e in from_threads.values()}) > 32


def test_examples_show_what_they_say(tmp_path: Path) -> None:
    source = cues(
        dataset(tmp_path, [[TINY, SMALL, LARGE]] * 5), mix=(1, 1, 1), padding=(0.0, 0.0), scale=(1.0, 1.0)
    )
    expected = {"tiny": (36, 26, 52, 42), "small": (10, 20, 26, 38), "large": (5, 5, 55, 45)}
    for example in (*map(source.train, range(40)), *all_held_out(source)):
        image = noise(seed=int(example.source.removesuffix(".png")))
        np.testing.assert_array_equal(example.image, image)
        assert example.box == expected[example.size_class]
        x1, y1, x2, y2 = map(int, example.box)
        np.testing.assert_array_equal(example.cue, image[y1:y2, x1:x2])
        assert example.skipped == ()


def test_mix_is_what_is_drawn(tmp_path: Path) -> None:
    source = cues(dataset(tmp_path, [[TINY, SMALL, SMALL, SMALL, LARGE]] * 10))
    drawn = Counter(source.train(index).size_class for index in range(2_000))
    assert drawn["tiny"] / 2_000 == pytest.approx(0.7, abs=0.04)
    assert drawn["small"] / 2_000 == pytest.approx(0.3, abs=0.04)
    assert set(drawn) == {"tiny", "small"}


def test_boxes_of_a_class_are_drawn_evenly(tmp_path: Path) -> None:
    source = cues(dataset(tmp_path, [[TINY], [TINY], [[40, 30, 7, 7], [60, 30, 7, 7], TINY]] * 2))
    sources = Counter(source.train(index).source for index in range(1_000))
    boxes = {f"{place}.png": 3 if place % 3 == 2 else 1 for place in range(6)}
    total = sum(boxes[name] for name in sources)
    assert len(sources) == 5
    for name, count in sources.items():
        assert count / 1_000 == pytest.approx(boxes[name] / total, abs=0.05)


def test_class_without_boxes_is_left_out_and_said(tmp_path: Path) -> None:
    source = cues(dataset(tmp_path, [[SMALL, LARGE]] * 5), mix=(0.7, 0.2, 0.1))
    drawn = Counter(source.train(index).size_class for index in range(400))
    assert drawn["small"] / 400 == pytest.approx(2 / 3, abs=0.1)
    assert set(drawn) == {"small", "large"}
    assert "no tiny boxes to train on, so the mix is 67% small, 33% large" in source.describe()


def test_mix_of_classes_without_boxes_is_refused(tmp_path: Path) -> None:
    path = dataset(tmp_path, [[LARGE]] * 5)
    with pytest.raises(
        UserError, match=r"--mix \(0.7, 0.3, 0.0\).*instances.json lacks \(0 tiny, 0 small, 5 large\)"
    ):
        cues(path)


@pytest.mark.parametrize(
    "bboxes", [[[TINY]], [[TINY], [LARGE]]], ids=["one image", "one image with boxes of the mix"]
)
def test_one_usable_image_is_too_few(tmp_path: Path, bboxes: list[Any]) -> None:
    with pytest.raises(UserError, match=r"instances.json has only 1 usable image: give two or more"):
        cues(dataset(tmp_path, bboxes))


# ---- holding out


@pytest.mark.parametrize(
    ("images", "held_out", "held_images"), [(2, 1, 1), (4, 100, 1), (20, 100, 4), (20, 3, 1), (20, 5, 2)]
)
def test_held_out_by_image(tmp_path: Path, images: int, held_out: int, held_images: int) -> None:
    source = cues(dataset(tmp_path, [[TINY, TINY, SMALL, LARGE]] * images), held_out=held_out)
    held = all_held_out(source)
    assert source.held_out_count == min(held_out, 3 * held_images)
    assert len({example.source for example in held}) == held_images
    trained = {source.train(index).source for index in range(20 * images)}
    assert trained.isdisjoint(example.source for example in held)
    assert len(trained) == images - held_images
    with pytest.raises(IndexError):
        source.held_out(source.held_out_count)


def test_held_out_boxes_are_used_once(tmp_path: Path) -> None:
    boxes = [[[10 * place, 30, 8, 9] for place in range(9)]] * 5
    held = all_held_out(cues(dataset(tmp_path, boxes), held_out=50, padding=(0.0, 0.0)))
    assert len({example.box for example in held}) == len(held) == 9


def test_held_out_is_the_same_for_every_seed_folder_and_order(tmp_path: Path) -> None:
    path = dataset(tmp_path, [[TINY, SMALL]] * 12)
    held = all_held_out(cues(path, seed=0))
    assert all(same(*pair) for pair in zip(held, all_held_out(cues(path, seed=99)), strict=True))
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path, moved)
    content = json.loads(path.read_text())
    content["images"].reverse()
    content["annotations"].reverse()
    (moved / "instances.json").write_text(json.dumps(content))
    assert {e.source for e in all_held_out(cues(moved / "instances.json"))} == {e.source for e in held}


def test_one_file_with_two_ids_is_not_on_both_sides(tmp_path: Path) -> None:
    path = dataset(tmp_path, [[TINY]] * 3)
    content = json.loads(path.read_text())
    for place in range(3):
        content["images"].append(
            {"id": f"again {place}", "file_name": f"./{place}.png", "width": WIDTH, "height": HEIGHT}
        )
        content["annotations"].append({"image_id": f"again {place}", "bbox": SMALL})
    path.write_text(json.dumps(content))
    source = cues(path)
    assert {source.train(index).source for index in range(50)}.isdisjoint(
        {example.source for example in all_held_out(source)}
    )


def test_held_out_follows_the_mix_when_it_can(tmp_path: Path) -> None:
    source = cues(dataset(tmp_path, [[SMALL, SMALL, LARGE, TINY]] * 60), held_out=10)
    assert Counter(example.size_class for example in all_held_out(source)) == {"tiny": 7, "small": 3}
    assert " 10 boxes on 7 images held out" in source.describe()


def test_held_out_shares_out_the_part_of_a_class_without_boxes(tmp_path: Path) -> None:
    source = cues(dataset(tmp_path, [[SMALL, SMALL, SMALL, LARGE]] * 60), held_out=10, mix=(0.6, 0.2, 0.2))
    assert Counter(example.size_class for example in all_held_out(source)) == {"small": 5, "large": 5}


def test_held_out_makes_up_for_a_rare_class(tmp_path: Path) -> None:
    source = cues(dataset(tmp_path, [[SMALL, SMALL, SMALL]] * 50 + [[TINY]] * 2), held_out=12)
    drawn = Counter(example.size_class for example in all_held_out(source))
    assert sum(drawn.values()) == 12
    assert drawn["small"] >= 10
    assert " 12 boxes on " in source.describe()
    assert int(source.describe().split(" held out")[0].split()[-2]) <= 6, (
        "a rare class does not cost a fifth of the images"
    )


def test_nothing_is_held_out_if_nothing_is_asked_for(tmp_path: Path) -> None:
    source = cues(dataset(tmp_path, [[TINY]] * 3), held_out=0)
    assert source.held_out_count == 0
    assert len({source.train(index).source for index in range(50)}) == 3


# ---- images that cannot be used


def test_truncated_image_is_passed_over_and_counted(tmp_path: Path) -> None:
    path = dataset(tmp_path, [[TINY, SMALL]] * 6)
    bad = cues(path).train(0).source
    before = [cues(path).train(index) for index in range(60)]
    truncate(tmp_path / bad)
    source = cues(path)
    examples = [source.train(index) for index in range(60)]
    sentences = [sentence for example in examples for sentence in example.skipped]
    assert len(sentences) >= sum(example.source == bad for example in before) > 0
    assert all(bad in sentence and "truncated" in sentence for sentence in sentences)
    assert bad not in {example.source for example in examples}
    assert all(same(was, now) for was, now in zip(before, examples, strict=True) if was.source != bad), (
        "the others stay as they were"
    )


def test_fifty_failures_in_a_row_are_the_end(tmp_path: Path) -> None:
    path = dataset(tmp_path, [[TINY]] * 5)
    source = cues(path)
    for image in tmp_path.glob("*.png"):
        image.write_text("no image")
    with pytest.raises(
        UserError,
        match=r"instances.json: 50 tries in a row gave no usable image, the last: .*\d.png is not an image",
    ) as caught:
        source.train(0)
    assert type(caught.value) is UserError


def test_image_of_another_size_than_its_boxes_is_passed_over(tmp_path: Path) -> None:
    path = dataset(tmp_path, [[TINY, SMALL]] * 3)
    source = cues(path)
    changed = source.train(0).source
    Image.fromarray(noise(50, 40)).save(tmp_path / changed)
    examples = [source.train(index) for index in range(30)]
    assert changed not in {example.source for example in examples}
    assert any(
        "50x40 pixels upright but its boxes are for 100x80" in sentence
        for example in examples
        for sentence in example.skipped
    )


def test_boxes_belong_to_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = dataset(tmp_path, [[SMALL]] * 4)
    for place in range(4):
        sideways = Image.fromarray(noise(seed=place)).transpose(Image.Transpose.ROTATE_90)
        sideways.save(tmp_path / f"{place}.png", exif=exif)
    example = cues(path).train(0)
    np.testing.assert_array_equal(example.image, noise(seed=int(example.source[0])))
    np.testing.assert_array_equal(example.cue, example.image[20:38, 10:26])


def test_image_below_min_side_is_passed_over(tmp_path: Path) -> None:
    path = dataset(tmp_path, [[TINY]] * 2)
    with pytest.raises(UserError, match=r"100x80 pixels, too small for a crop of 90 pixels"):
        cues(path, min_side=90).train(0)


# ---- folders without boxes


# ---- the one line


def test_describe(tmp_path: Path) -> None:
    path = dataset(tmp_path, [[TINY, SMALL, SMALL, LARGE]] * 4 + [[]])
    assert (
        cues(path).describe()
        == "5 images (1 without boxes), 16 boxes (4 tiny, 8 small, 4 large), 3 boxes on 1 image held out"
    )


def test_describe_counts_what_was_left_out(tmp_path: Path) -> None:
    path = dataset(
        tmp_path, [[TINY], [TINY, [-4, 0, 9, 9]], [TINY, [1, 1, -2, 3], [1, 1, 0, 3], [1, 1, 0, 3]]]
    )
    assert cues(path, held_out=1).describe() == (
        "3 images, 4 boxes (4 tiny, 0 small, 0 large), 1 box on 1 image held out; no small boxes to train "
        "on, so the mix is 100% tiny; clipped 1 box "
        "to the image; dropped 3 boxes: 1 reversed (first: instances.json annotations[4]), 2 of zero area "
        "(first: instances.json annotations[5])"
    )
