"""`read_boxes` on COCO json, JSON lines and folders: what it keeps, what it counts, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from locus_fast.data import read_boxes
from tests.locus_fast.data.file_cases import box_line, draw, drops, lines, refusal

# ---- COCO


# ---- JSON lines


def test_jsonl_boxes_are_xyxy_and_sizes_come_from_the_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    table = read_boxes(
        lines(
            tmp_path,
            [
                box_line([10, 20, 40, 35]),
                "",
                box_line([1, 2, 30, 70], "turned.jpg"),
                box_line([0, 0, 9.5, 9]),
            ],
        ),
        None,
    )
    assert table.has_boxes
    assert table.names == ["a.png", "turned.jpg"]
    assert table.image_index.tolist() == [0, 1, 0]
    assert table.boxes.tolist() == [[10, 20, 40, 35], [1, 2, 30, 60], [0, 0, 9.5, 9]]
    assert table.sizes.tolist() == [[100, 80], [40, 60]], "upright"
    assert table.clipped == 1


def test_bad_jsonl_boxes_are_counted_by_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    bad = [[5, 5, 1, 9], [5, 5, 5, 9], [200, 5, 210, 9], "box", [1, 2, "3", 4], [1, 2, float("nan"), 4]]
    records = [
        *map(box_line, bad),
        box_line([1, 1, 9, 9], "text.png"),
        box_line([1, 1, 9, 9], "nowhere.png"),
        "",
        box_line([1, 1, 9, 9]),
    ]
    table = read_boxes(lines(tmp_path, records), None)
    assert table.boxes.tolist() == [[1, 1, 9, 9]]
    assert drops(table) == {
        "without 4 values": (1, "boxes.jsonl line 4"),
        "not made of numbers": (1, "boxes.jsonl line 5"),
        "not finite": (1, "boxes.jsonl line 6"),
        "reversed": (1, "boxes.jsonl line 1"),
        "of zero area": (1, "boxes.jsonl line 2"),
        "on an image that cannot be read": (2, "boxes.jsonl line 7"),
        "outside the image": (1, "boxes.jsonl line 3"),
    }


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            '{"image": "a.png", "bbox": [1, 2, 3, 4]',
            "line 2 is not JSON (Expecting ',' delimiter, column 40)",
        ),
        ("[1, 2]", 'line 2 lacks "image" or "bbox"'),
        ('{"image": "a.png"}', 'line 2 lacks "image" or "bbox"'),
        ('{"bbox": [1, 2, 3, 4]}', 'line 2 lacks "image" or "bbox"'),
        ('{"image": 3, "bbox": [1, 2, 3, 4]}', 'line 2 lacks "image" or "bbox"'),
        ('{"image": "", "bbox": [1, 2, 3, 4]}', 'line 2 lacks "image" or "bbox"'),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = lines(tmp_path, [box_line([1, 2, 3, 4]), line])
    assert f"{path} {says}" in refusal(path)


def test_jsonl_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = lines(tmp_path, [""])
    assert f"{path} is empty" in refusal(path)
    path.write_bytes(b'\n{"image": "\xff", "bbox": []}')
    assert f"{path} line 2 is not UTF-8" in refusal(path)
    path = lines(tmp_path, [box_line([1, 2, 3, 4], "nowhere.png")])
    assert str(tmp_path / "nowhere.png") in refusal(path)
    path = lines(tmp_path, [box_line([4, 2, 3, 4])])
    assert "1 reversed (first: boxes.jsonl line 1)" in refusal(path)


# ---- folders


def test_folder_is_searched_with_its_subfolders(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp"):
        draw(tmp_path / name)
    for name in ("notes.txt", "sub/._c.webp"):
        (tmp_path / name).write_text("")
    table = read_boxes(tmp_path, None)
    assert table.names == ["a.JPG", "b.png", "sub/c.webp"]
    assert not table.has_boxes
    assert table.boxes.shape == (0, 4)
    assert table.sizes.tolist() == [[0, 0]] * 3
    assert drops(table) == {"of other kinds": (2, "notes.txt")}


def test_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    names = [f"{place:02}/{file}.png" for place in range(12) for file in "ab"]
    for name in reversed(names):
        draw(tmp_path / name)
    assert read_boxes(tmp_path, None).names == names


def test_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    sentence = refusal(tmp_path)
    assert f"--data {tmp_path} holds no images" in sentence
    assert ".jpg" in sentence
    draw(tmp_path / "a.png")
    assert "leave --images out" in refusal(tmp_path, tmp_path)


def test_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text("1")
    assert f"--data {path} is neither" in refusal(path)


# ---- size
