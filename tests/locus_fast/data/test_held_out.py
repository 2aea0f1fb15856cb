"""Held-out images that cannot be used: others take their place, and none of them is trained on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from locus_fast.data import cues as cue_source
from locus_fast.data.cues import FileCues
from locus_fast.errors import UserError
from tests.locus_fast.cue_cases import SMALL, TINY, all_held_out, cues, dataset, noise, truncate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place in range(6):
        Image.fromarray(noise(400, 300, seed=place)).save(tmp_path / f"{place}.png")
    return tmp_path


def test_truncated_held_out_image_is_replaced_by_the_next(tmp_path: Path) -> None:
    path = dataset(tmp_path, [[TINY, SMALL]] * 10)
    held = all_held_out(cues(path))
    first, second = dict.fromkeys(example.source for example in held)
    truncate(tmp_path / first)
    replaced = all_held_out(cues(path))
    assert {example.source for example in replaced} == {second}
    assert [len(example.skipped) for example in replaced] == [
        int(example.source == first) for example in held
    ]
    source = cues(path)
    truncate(tmp_path / second)
    with pytest.raises(
        UserError, match=f"instances.json: 2 tries in a row gave no usable image, the last: image .*{second}"
    ):
        source.held_out(0)


def held_images(source: FileCues) -> list[str]:
    return list(dict.fromkeys(example.source for example in all_held_out(source)))


def test_others_are_held_out_if_none_of_the_first_can_be_used(tmp_path: Path) -> None:
    """The next in the order of the names' hashes, whatever the seed; and none of them is trained on."""
    path = dataset(tmp_path, [[TINY, SMALL]] * 10)
    order = sorted(
        (f"{place}.png" for place in range(10)), key=lambda name: hashlib.sha256(name.encode()).digest()
    )
    assert held_images(cues(path)) == order[:2]
    for name in order[:2]:
        truncate(tmp_path / name)
    sources = [cues(path), cues(path), cues(path, seed=9)]
    assert [held_images(source) for source in sources] == [order[2:3]] * 3, (
        "a fifth of the eight that are left"
    )
    assert {sources[0].train(index).source for index in range(300)} == set(order[3:])
    held = all_held_out(sources[0])
    assert [len(example.skipped) for example in held] == [2] + [0] * (len(held) - 1), "each is named once"
    assert all(name in "".join(held[0].skipped) for name in order[:2])
    assert "1 image held out, in place of 2 images that cannot be used" in sources[0].describe()


@pytest.mark.parametrize("spoil", ["missing", "truncated", "of another size", "too small"])
def test_held_out_is_tried_before_the_start(tmp_path: Path, spoil: str) -> None:
    """Three images, one held out: whatever is wrong with it, another takes its place."""
    path = dataset(tmp_path, [[TINY, SMALL]] * 3)
    (bad,) = held_images(cues(path))
    if spoil == "missing":
        (tmp_path / bad).unlink()
    elif spoil == "truncated":
        truncate(tmp_path / bad)
    else:
        Image.fromarray(noise(*((90, 80) if spoil == "of another size" else (17, 12)))).save(tmp_path / bad)
    source = cues(path)
    (other,) = held_images(source)
    trained = {source.train(index).source for index in range(50)}
    assert len({bad, other, *trained}) == 3
    assert trained == {f"{place}.png" for place in range(3)} - {bad, other}


def test_others_of_a_folder_are_held_out_too(folder: Path) -> None:
    (bad,) = held_images(cues(folder))
    truncate(folder / bad)
    source = cues(folder)
    (other,) = held_images(source)
    assert {source.train(index).source for index in range(100)} == {f"{place}.png" for place in range(6)} - {
        bad,
        other,
    }


def test_no_more_is_decoded_at_the_start_than_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dataset(tmp_path, [[TINY, SMALL]] * 40)
    decoded: list[str] = []
    load = cue_source.load_rgb
    monkeypatch.setattr(cue_source, "load_rgb", lambda file: decoded.append(file.name) or load(file))
    first = held_images(source := cues(path, held_out=16))[0]
    assert len(source._split.held_pictures) == 8
    decoded.clear()
    cues(path, held_out=16)
    assert decoded == [first]


def test_a_held_out_image_that_failed_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dataset(tmp_path, [[TINY, SMALL]] * 20)
    first, *_ = held_images(cues(path, held_out=8))
    truncate(tmp_path / first)
    decoded: list[str] = []
    load = cue_source.load_rgb
    monkeypatch.setattr(cue_source, "load_rgb", lambda file: decoded.append(file.name) or load(file))
    source = cues(path, held_out=8)
    assert sum(bool(example.skipped) for example in all_held_out(source)) > 1
    assert decoded.count(first) == 1


def test_two_images_of_which_one_cannot_be_used_are_too_few(tmp_path: Path) -> None:
    path = dataset(tmp_path, [[TINY, SMALL]] * 2)
    (bad,) = held_images(cues(path))
    truncate(tmp_path / bad)
    with pytest.raises(
        UserError,
        match=rf"has only 1 usable image: .*; 1 image cannot be used, the last: image .*{bad} is truncated",
    ):
        cues(path)


def test_many_unusable_held_out_images_in_a_row_are_the_end(tmp_path: Path) -> None:
    path = dataset(tmp_path, [[TINY, SMALL]] * 80)
    for place in range(80):
        (tmp_path / f"{place}.png").write_text(f"no image {place}")
    with pytest.raises(
        UserError,
        match=r"instances.json: 5\d tries in a row gave no usable image, the last: .* is not an image",
    ):
        cues(path)


def test_one_try_is_one_try(tmp_path: Path) -> None:
    source = cues(dataset(tmp_path, [[TINY]] * 3))
    for image in tmp_path.glob("*.png"):
        truncate(image)
    with pytest.raises(UserError, match=r"instances.json: 1 try in a row gave no usable image"):
        source.held_out(0)
