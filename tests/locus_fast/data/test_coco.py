"""COCO files to boxes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from locus_fast.data import read_boxes
from tests.locus_fast.data.file_cases import GOOD, coco, draw, drops, refusal


def test_coco_boxes_become_xyxy(tmp_path: Path) -> None:
    table = read_boxes(coco(tmp_path, [GOOD, [0.5, 0.25, 2.5, 3.0]]), None)
    assert table.has_boxes
    assert table.names == ["a.png"]
    assert table.path(0) == tmp_path / "a.png"
    assert table.boxes.dtype == np.float32
    assert table.boxes.tolist() == [[10, 20, 40, 35], [0.5, 0.25, 3.0, 3.25]]
    assert (table.image_index.dtype, table.image_index.tolist()) == (np.int32, [0, 0])
    assert (table.sizes.dtype, table.sizes.tolist()) == (np.int32, [[100, 80]])
    assert (table.dropped, table.clipped, table.dropped_text()) == ({}, 0, "")


def test_coco_in_any_key_order_with_ids_of_any_type(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        draw(tmp_path / name)
    path = tmp_path / "instances.json"
    path.write_text(
        """{"annotations": [{"iscrowd": 0, "segmentation": [[1, 2, 3]], "bbox": [1, 2, 3, 4], "image_id": 7},
        {"image_id": "7", "segmentation": {"counts": [1], "size": [2, 3]}, "bbox": [2, 2, 3, 4]},
        {"bbox": [3, 2, 3, 4], "image_id": 8.0},
        {"bbox": [4, 2, 3, 4], "image_id": "x9"}], "info": {"bbox": null},
        "images": [{"file_name": "a.png", "id": "7", "height": 80, "width": 100},
        {"id": 8, "file_name": "b.png", "image_id": 8}, {"id": "x9",
        "file_name": "c.png"}]}"""
    )
    table = read_boxes(path, None)
    assert table.names == ["a.png", "b.png", "c.png"]
    assert table.image_index.tolist() == [0, 0, 1, 2]
    assert table.boxes[:, 0].tolist() == [1, 2, 3, 4]
    assert table.sizes.tolist() == [[100, 80]] * 3, "sizes that the file does not state come from the images"


def test_coco_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = coco(tmp_path, [GOOD])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_boxes(path, None).boxes) == 1


BAD_BOXES = [
    (["x", 1, 2, 3], "not made of numbers"),
    ([True, 1, 2, 3], "not made of numbers"),
    ([None, 1, 2, 3], "not made of numbers"),
    ([1, 2, 3], "without 4 values"),
    ([1, 2, 3, 4, 5], "without 4 values"),
    ("1 2 3 4", "without 4 values"),
    (None, "without 4 values"),
    ([float("nan"), 1, 2, 3], "not finite"),
    ([1, 1, float("inf"), 3], "not finite"),
    ([1, 1, 10**400, 3], "not finite"),
    ([1, 1, -2, 3], "reversed"),
    ([1, 1, 0, 3], "of zero area"),
    ([1, 1, 5, 0.0], "of zero area"),
    ([100, 10, 5, 5], "outside the image"),
    ([10, -20, 5, 20], "outside the image"),
    ([90, 10, 1e-7, 5], "of almost zero area"),
]


@pytest.mark.parametrize(("bbox", "reason"), BAD_BOXES)
def test_bad_coco_box_is_counted(tmp_path: Path, bbox: Any, reason: str) -> None:
    table = read_boxes(coco(tmp_path, [GOOD, bbox, GOOD, bbox]), None)
    assert table.boxes.tolist() == [[10, 20, 40, 35]] * 2
    assert drops(table) == {reason: (2, "instances.json annotations[1]")}
    assert table.dropped_text() == f"2 {reason} (first: instances.json annotations[1])"


def test_other_annotations_that_are_left_out(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 1, "bbox": GOOD, "iscrowd": 1},
        {"image_id": 2, "bbox": GOOD},
        {"bbox": GOOD},
        None,
        {"image_id": 1},
        {"image_id": 1, "bbox": GOOD},
    ]
    table = read_boxes(coco(tmp_path, [], annotations=annotations), None)
    assert len(table.boxes) == 1
    assert drops(table) == {
        "of a crowd": (1, "instances.json annotations[0]"),
        "on an unknown image": (2, "instances.json annotations[1]"),
        "not a JSON object": (1, "instances.json annotations[3]"),
        "without 4 values": (1, "instances.json annotations[4]"),
    }


def test_boxes_that_stick_out_are_clipped_and_counted(tmp_path: Path) -> None:
    table = read_boxes(coco(tmp_path, [[-5, -5, 20, 20], [90, 70, 20, 20], [90, 70, 10.001, 10], GOOD]), None)
    assert table.boxes.tolist() == [[0, 0, 15, 15], [90, 70, 100, 80], [90, 70, 100, 80], [10, 20, 40, 35]]
    assert table.clipped == 2, "a thousandth of a pixel is rounding"


def test_one_file_under_two_spellings_is_one_image(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    names = ["a.png", "./a.png", str(tmp_path / "a.png")]
    images = [{"id": place, "file_name": name} for place, name in enumerate(names)]
    annotations = [{"image_id": place, "bbox": GOOD} for place in range(3)]
    table = read_boxes(coco(tmp_path, [], images=images, annotations=annotations), None)
    assert table.names == ["a.png"]
    assert table.image_index.tolist() == [0, 0, 0]


def test_images_without_boxes_stay(tmp_path: Path) -> None:
    images = [
        {"id": place, "file_name": name, "width": 100, "height": 80}
        for place, name in enumerate(["nobody.png", "a.png"])
    ]
    table = read_boxes(coco(tmp_path, [GOOD], images=images), None)
    assert table.names == ["nobody.png", "a.png"]
    assert table.image_index.tolist() == [1]


def test_images_folder_is_where_names_are_looked_up(tmp_path: Path) -> None:
    draw(tmp_path / "pictures" / "a.png")
    path = coco(tmp_path / "boxes", [GOOD])
    (tmp_path / "boxes" / "a.png").unlink()
    assert read_boxes(path, tmp_path / "pictures").path(0) == tmp_path / "pictures" / "a.png"
    sentence = refusal(path)
    assert str(tmp_path / "boxes" / "a.png") in sentence
    assert "--images" in sentence
    sentence = refusal(path, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in sentence
    assert "--images" in sentence


def test_one_image_of_the_first_few_is_enough(tmp_path: Path) -> None:
    images = [
        {"id": place, "file_name": "a.png" if place == 19 else f"{place}.png", "width": 100, "height": 80}
        for place in range(25)
    ]
    annotations = [{"image_id": place, "bbox": GOOD} for place in range(25)]
    assert len(read_boxes(coco(tmp_path, [], images=images, annotations=annotations), None).boxes) == 25
    annotations.reverse()  # now it is the sixth
    assert len(read_boxes(coco(tmp_path, [], images=images, annotations=annotations), None).boxes) == 25
    images[19]["file_name"] = "19.png"
    assert "24.png" in refusal(coco(tmp_path, [], images=images, annotations=annotations))


def test_coco_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    assert f"--data {path} does not exist" in refusal(path)
    path.write_text("")
    assert f"{path} is empty" in refusal(path)
    path.write_text(" \n")
    assert f"{path} is empty" in refusal(path)
    path.write_text('{\n"images": [],\n"annotations": [1, 2,, 3]}')
    assert f"{path} line 3 column 22 is not JSON" in refusal(path)
    path.write_text('{"images": [], "annotations": [{"bbox": [1, 2')
    assert f"{path} line 1 column 46 is not JSON" in refusal(path)
    path.write_text("[" * 100_000)
    assert f"{path} is not JSON that can be read" in refusal(path)
    path.write_bytes(b'{"images": "\xff"}')
    assert f"{path} is not UTF-8 text (byte 12)" in refusal(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"images": []}, 'no list "annotations"'),
        ({"annotations": []}, 'no list "images"'),
        ({"images": {}, "annotations": []}, 'no list "images"'),
        ([{"image_id": 1, "bbox": GOOD}], 'no list "images"'),
        ({"images": [], "annotations": []}, "it lists none"),
        ({"images": [{"id": 1}], "annotations": []}, "images[0] lacks an id or a file_name"),
        ({"images": [{"file_name": "a.png"}], "annotations": []}, "images[0] lacks an id or a file_name"),
        (
            {
                "images": [{"id": 1, "file_name": "a.png"}, {"id": "1", "file_name": "b.png"}],
                "annotations": [],
            },
            "images[1] repeats the id '1'",
        ),
    ],
)
def test_json_that_is_not_coco(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    sentence = refusal(path)
    assert str(path) in sentence
    assert says in sentence


def test_all_boxes_dropped_says_why(tmp_path: Path) -> None:
    path = coco(tmp_path, [[1, 1, -2, 3], [1, 1, 0, 3], [1, 1, 0, 3]])
    assert (
        f"{path} has no box that can be used (1 reversed (first: instances.json annotations[0]), 2 of zero "
        "area" in refusal(path)
    )
    path = coco(tmp_path, [[1, 2, 3]])
    assert "1 without 4 values" in refusal(path)


MEASURE = """
import sys
from pathlib import Path
from locus_fast.data import read_boxes

def peak_mb():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

before = peak_mb()
table = read_boxes(Path(sys.argv[1]), None)
print(len(table.boxes), peak_mb() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_is_a_small_multiple_of_the_file(tmp_path: Path) -> None:
    """60,000 annotations with outlines, a tenth of COCO train2014; parsed into plain Python objects they take
    about 6 MB a MB of file."""
    chance = random.Random(0)
    outlines = [
        ", ".join(f"{chance.uniform(0, 640):.2f}" for _ in range(2 * chance.randint(15, 70)))
        for _ in range(200)
    ]
    draw(tmp_path / "0.png", 640, 480)
    path = tmp_path / "instances.json"
    with path.open("w") as file:
        file.write('{"annotations": [')
        for place in range(60_000):
            file.write(
                f'{{"segmentation": [[{outlines[place % 200]}]], "image_id": {place % 8_000}, '
                f'"bbox": [{place % 600}, 9.5, 30.25, 40.5]}}, '
            )
        images = [
            {"id": place, "file_name": f"{place}.png", "width": 640, "height": 480} for place in range(8_000)
        ]
        file.write(f'{{"image_id": 0, "bbox": [1, 2, 3, 4]}}], "images": {json.dumps(images)}}}')
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    boxes, grown_mb = run.stdout.split()
    assert int(boxes) == 60_001
    assert float(grown_mb) < 3.0 * path.stat().st_size / 2**20
