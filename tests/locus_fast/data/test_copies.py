"""Copies of one picture: told by their bytes, and never on both sides of the split."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from locus_fast.data import copies, read_boxes
from locus_fast.data.copies import first_copies
from locus_fast.data.cues import FileCues
from locus_fast.errors import UserError
from tests.locus_fast.cue_cases import HEIGHT, SMALL, TINY, WIDTH, all_held_out, cues, noise

COUNT = 12


def by_reading(paths: list[Path]) -> list[int]:
    """Plainly: every file read, and compared with those before it."""
    contents = [path.read_bytes() for path in paths]
    return [contents.index(content) for content in contents]


def test_first_copies_are_those_of_reading_every_file(tmp_path: Path) -> None:
    """Files that share a size, a size and an end, or everything; longer and shorter than what is read of the
    end."""
    chance = np.random.default_rng(0)
    ends = [chance.bytes(5000) for _ in range(3)]
    contents = [chance.bytes(size) for size in (1, 1, 2, 100, 100, 4096, 4097)]
    contents += [bytes([first]) * 3000 + end for first in (1, 2) for end in ends]
    contents += [bytes([first]) * length for first in (1, 2) for length in (4096, 9000)]
    paths = []
    for place in chance.integers(0, len(contents), 400):
        paths.append(tmp_path / f"{len(paths)}.jpg")
        paths[-1].write_bytes(contents[place])
    found = first_copies(paths)
    assert found.dtype == np.int32
    assert found.tolist() == by_reading(paths)


def test_files_that_cannot_be_read_are_nobodys_copies(tmp_path: Path) -> None:
    for name in ("empty.png", "empty too.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    names = [
        "empty.png",
        "empty too.png",
        "nowhere.png",
        "nowhere.png",
        "folder.png",
        "folder.png",
        "a\0.png",
        "a\0.png",
    ]
    assert first_copies([tmp_path / name for name in names]).tolist() == list(range(8))


def test_whole_files_are_read_only_where_size_and_end_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, read = np.random.default_rng(0), []
    whole = copies._whole
    monkeypatch.setattr(copies, "_whole", lambda path: read.append(path.name) or whole(path))
    for place in range(50):
        (tmp_path / f"{place}.jpg").write_bytes(chance.bytes(20_000))
    shutil.copy(tmp_path / "7.jpg", tmp_path / "50.jpg")
    found = first_copies([tmp_path / f"{place}.jpg" for place in range(51)])
    assert found[50] == 7
    assert sorted(read) == ["50.jpg", "7.jpg"]


def test_no_files() -> None:
    assert first_copies([]).tolist() == []


# ---- other names of a picture


def hard_link(pool: Path, place: int) -> str:
    os.link(pool / f"{place}.png", pool / f"again {place}.png")
    return f"again {place}.png"


def symbolic_link(pool: Path, place: int) -> str:
    (pool / f"again {place}.png").symlink_to(pool / f"{place}.png")
    return f"again {place}.png"


def copy(pool: Path, place: int) -> str:
    (pool / "more").mkdir(exist_ok=True)
    shutil.copy(pool / f"{place}.png", pool / "more" / f"{place}.png")
    return f"more/{place}.png"


def linked_folder(pool: Path, place: int) -> str:
    link = pool.parent / "linked"
    if not link.exists():
        link.symlink_to(pool)
    return str(link / f"{place}.png")


FILES = [copy, hard_link, symbolic_link]
SPELLINGS: dict[str, Callable[[Path, int], str]] = {
    "dot": lambda pool, place: f"./{place}.png",
    "up and down": lambda pool, place: f"../pool/{place}.png",
    "detour": lambda pool, place: f"more/..//{place}.png",
    "absolute": lambda pool, place: str(pool / f"{place}.png"),
    "absolute detour": lambda pool, place: str(pool / ".." / "pool" / f"{place}.png"),
}


def pool_of(folder: Path, other: Callable[[Path, int], str], kind: str, shift: int = 0) -> Path:
    """Twelve pictures in pool/, each under two names with one box each."""
    pool = folder / "pool"
    (pool / "more").mkdir(parents=True)
    names = []
    for place in range(COUNT):
        Image.fromarray(noise(seed=place)).save(pool / f"{place}.png")
        names += [(f"{place}.png", TINY), (other(pool, place), SMALL)]
    names = names[shift:] + names[:shift]
    if kind == "folder":
        return pool
    if kind == "coco":
        images = [
            {"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT}
            for i, (name, _) in enumerate(names)
        ]
        annotations = [{"image_id": i, "bbox": box} for i, (_, box) in enumerate(names)]
        (pool / "boxes.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        return pool / "boxes.json"
    lines = [{"image": name, "bbox": [x, y, x + w, y + h]} for name, (x, y, w, h) in names]
    (pool / "boxes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return pool / "boxes.jsonl"


def shown(source: FileCues) -> tuple[set[bytes], set[bytes]]:
    """The pixels that are held out and those that are trained on."""
    return {e.image.tobytes() for e in all_held_out(source)}, {
        source.train(index).image.tobytes() for index in range(300)
    }


@pytest.mark.parametrize("kind", ["coco", "jsonl", "folder"])
@pytest.mark.parametrize("other", FILES, ids=[other.__name__ for other in FILES])
def test_copies_and_links_fall_on_one_side(
    tmp_path: Path, other: Callable[[Path, int], str], kind: str
) -> None:
    held, trained = shown(source := cues(pool_of(tmp_path, other, kind), held_out=5))
    assert held
    assert held.isdisjoint(trained)
    assert len(held | trained) == COUNT
    assert f"24 images ({COUNT} copies of others)" in source.describe()


@pytest.mark.parametrize("kind", ["coco", "jsonl"])
@pytest.mark.parametrize("other", [*SPELLINGS.values(), linked_folder], ids=[*SPELLINGS, "linked folder"])
def test_spellings_of_a_path_fall_on_one_side(
    tmp_path: Path, other: Callable[[Path, int], str], kind: str
) -> None:
    held, trained = shown(cues(pool_of(tmp_path, other, kind), held_out=5))
    assert held
    assert held.isdisjoint(trained)
    assert len(held | trained) == COUNT


@pytest.mark.parametrize("root", ["absolute", "relative"])
@pytest.mark.parametrize("other", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_of_a_path_are_one_image(
    tmp_path: Path, other: Callable[[Path, int], str], root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pool_of(tmp_path, other, "jsonl", shift=1)
    monkeypatch.chdir(tmp_path)
    table = read_boxes(path if root == "absolute" else path.relative_to(tmp_path), None)
    assert sorted(table.names) == sorted(f"{place}.png" for place in range(COUNT))
    assert table.copies() == 0
    assert all(table.path(place).is_file() for place in range(COUNT))


def test_images_beside_their_folder_are_one_image_however_they_are_spelled(tmp_path: Path) -> None:
    """Whichever spelling comes first, the relative name stays."""
    (tmp_path / "pool").mkdir()
    (tmp_path / "boxes").mkdir()
    Image.fromarray(noise()).save(tmp_path / "pool" / "a.png")
    names = [str(tmp_path / "pool" / "a.png"), "../pool/a.png", "../boxes/../pool/./a.png"]
    for order in (names, names[::-1]):
        (tmp_path / "boxes" / "b.jsonl").write_text(
            "\n".join(json.dumps({"image": name, "bbox": [1, 2, 30, 40]}) for name in order)
        )
        table = read_boxes(tmp_path / "boxes" / "b.jsonl", None)
        assert table.names == ["../pool/a.png"]
        assert len(table.boxes) == 3


def test_the_way_up_from_a_linked_folder_is_kept(tmp_path: Path) -> None:
    """there/.. is the folder above the link's target: without the detour it would be another file."""
    for folder, seed in (("pool", 0), ("elsewhere", 1)):
        (tmp_path / folder / "deep").mkdir(parents=True)
        Image.fromarray(noise(seed=seed)).save(tmp_path / folder / "a.png")
    (tmp_path / "pool" / "there").symlink_to(tmp_path / "elsewhere" / "deep")
    path = tmp_path / "pool" / "boxes.jsonl"
    path.write_text(
        "\n".join(json.dumps({"image": name, "bbox": [1, 2, 30, 40]}) for name in ("there/../a.png", "a.png"))
    )
    table = read_boxes(path, None)
    assert len(table.names) == 2
    assert [
        table.path(row).read_bytes() == (tmp_path / "elsewhere" / "a.png").read_bytes() for row in range(2)
    ] == [True, False]


# ---- the order that pictures are held out in


def ranked(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def held_names(source: FileCues) -> set[str]:
    return {example.source for example in all_held_out(source)}


def test_without_copies_images_are_held_out_by_the_hash_of_their_names(tmp_path: Path) -> None:
    pool_of(tmp_path, lambda pool, place: f"{place}.png", "coco")
    names = [f"{place}.png" for place in range(COUNT)]
    assert held_names(cues(tmp_path / "pool" / "boxes.json", held_out=4)) == set(ranked(names)[:2])
    (tmp_path / "pool" / "boxes.json").unlink()
    assert held_names(cues(tmp_path / "pool", held_out=9)) == set(ranked(names)[:2])


def test_copies_take_one_rank_that_of_their_first_name(tmp_path: Path) -> None:
    """In any order of the file, and wherever the folder lies."""
    order = ranked([f"{folder}{place}.png" for place in range(COUNT) for folder in ("", "more/")])
    rank = {
        place: min(order.index(f"{place}.png"), order.index(f"more/{place}.png")) for place in range(COUNT)
    }
    first = sorted(rank, key=rank.__getitem__)[:2]
    expected = {noise(seed=place).tobytes() for place in first}
    for number, shift in enumerate((0, 1, 7)):
        source = cues(pool_of(tmp_path / str(number), copy, "coco", shift), held_out=4)
        assert {e.image.tobytes() for e in all_held_out(source)} == expected


def test_copies_of_one_picture_are_too_few(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(noise()).save(tmp_path / name)
    with pytest.raises(
        UserError,
        match=r"has only 1 usable image: give two or more, as one is held out; copies of one file count once",
    ):
        cues(tmp_path)


def test_boxes_of_all_copies_are_used(tmp_path: Path) -> None:
    source = cues(pool_of(tmp_path, copy, "coco"), held_out=4, mix=(1, 1, 0))
    drawn: dict[str, Any] = {"tiny": set(), "small": set()}
    for index in range(400):
        example = source.train(index)
        drawn[example.size_class].add(example.image.tobytes())
    assert len(drawn["tiny"]) == len(drawn["small"]) == COUNT - 2
