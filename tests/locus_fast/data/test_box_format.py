"""`--box-format`: every format is read as the same pixels, and a file in another one than its kind's is
refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from locus_fast import evaluate, train
from locus_fast.config import parse
from locus_fast.config.settings import BOX_FORMATS
from locus_fast.data import read_boxes
from locus_fast.data.box_format import check_standard
from locus_fast.errors import UserError
from tests.locus_fast.box_cases import (
    COCO,
    LARGE,
    MEANING,
    SIZES,
    STANDARD,
    anywhere,
    drops,
    named,
    refusal,
    write,
    written,
)

# ---- reading


@pytest.mark.parametrize("kind", STANDARD)
@pytest.mark.parametrize("form", BOX_FORMATS[1:])
def test_every_format_gives_the_same_pixels(tmp_path: Path, kind: str, form: str) -> None:
    boxes = anywhere(COCO, 40)
    table = read_boxes(write(tmp_path, kind, COCO, boxes, form), None, form)
    np.testing.assert_allclose(table.boxes, [box for _, box in boxes], rtol=0, atol=1e-4)
    assert table.clipped == 0
    assert table.note == ("" if form == STANDARD[kind] else f"boxes read as {MEANING[form]}")


@pytest.mark.parametrize("kind", STANDARD)
def test_auto_is_the_standard_of_the_file(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, COCO, anywhere(COCO, 10), STANDARD[kind])
    automatic, named = read_boxes(path, None), read_boxes(path, None, STANDARD[kind])
    np.testing.assert_array_equal(automatic.boxes, named.boxes)


def test_bad_boxes_are_counted_in_every_format(tmp_path: Path) -> None:
    """Of an image of 100 x 80: reversed, of zero area, outside, not finite, on an image that is not there."""
    Image.new("L", (100, 80)).save(tmp_path / "0.png")
    bad = {
        "normalized": [
            [0.5, 0.1, 0.2, 0.3],
            [0.5, 0.1, 0.5, 0.3],
            [1.5, 0.1, 1.7, 0.3],
            [0.1, 0.1, float("inf"), 0.3],
        ],
        "thousand": [
            [500, 100, 200, 300],
            [500, 100, 500, 300],
            [1500, 100, 1700, 300],
            [100, 100, float("nan"), 300],
        ],
        "xywh": [[50, 10, -30, 20], [50, 10, 0, 20], [150, 10, 20, 20], [10, 10, float("inf"), 20]],
    }
    good = {"normalized": [0.1, 0.1, 0.4, 0.5], "thousand": [100, 100, 400, 500], "xywh": [10, 8, 30, 32]}
    for form, boxes in bad.items():
        lines: list[dict[str, Any]] = [{"image": "0.png", "bbox": box} for box in [good[form], *boxes]]
        (tmp_path / "boxes.jsonl").write_text(
            "\n".join(map(json.dumps, [*lines, {"image": "nowhere.png", "bbox": good[form]}]))
        )
        table = read_boxes(tmp_path / "boxes.jsonl", None, form)
        assert table.boxes.tolist() == [[10, 8, 40, 40]], form
        expected = (
            "not finite",
            "reversed",
            "of zero area",
            "on an image that cannot be read",
            "outside the image",
        )
        assert drops(table) == dict.fromkeys(expected, 1), form


def test_the_option_goes_with_a_file(tmp_path: Path) -> None:
    Image.new("L", (100, 80)).save(tmp_path / "0.png")
    assert "--box-format thousand goes with a .json or .jsonl file" in refusal(tmp_path, "thousand")
    with pytest.raises(UserError, match="--box-format needs --data"):
        parse(["--box-format", "thousand"])
    with pytest.raises(UserError, match=r"--box-format must be one of .*, not 'percent'"):
        parse(["--data", str(tmp_path), "--box-format", "percent"])


# ---- files in another format than their kind's


@pytest.mark.parametrize("kind", STANDARD)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("count", [1, 3, 60, 2000])
def test_shares_of_one_are_named(tmp_path: Path, kind: str, sizes: list[tuple[int, int]], count: int) -> None:
    sentence = refusal(write(tmp_path, kind, sizes, anywhere(sizes, count), "normalized"))
    assert named(sentence) == {"normalized"}
    assert f"{count:,} of its {count:,} boxes lie within the first pixel" in sentence


@pytest.mark.parametrize("kind", STANDARD)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("count", [1, 3, 60, 2000])
def test_the_other_kinds_pixels_are_named(
    tmp_path: Path, kind: str, sizes: list[tuple[int, int]], count: int
) -> None:
    """xywh in JSONL and xyxy in COCO. What few boxes within 1000 leave open is said as well."""
    other = {"coco": "xyxy", "jsonl": "xywh"}[kind]
    fits = named(refusal(write(tmp_path, kind, sizes, anywhere(sizes, count), other)))
    assert other in fits
    assert fits <= {other, "thousand"}
    if kind == "jsonl":
        assert fits == {other}


@pytest.mark.parametrize("kind", STANDARD)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("count", [60, 2000])
def test_shares_of_a_thousand_are_named(
    tmp_path: Path, kind: str, sizes: list[tuple[int, int]], count: int
) -> None:
    assert named(refusal(write(tmp_path, kind, sizes, anywhere(sizes, count), "thousand"))) == {"thousand"}


@pytest.mark.parametrize("kind", STANDARD)
def test_few_shares_of_a_thousand_are_named_on_images_below_it(tmp_path: Path, kind: str) -> None:
    assert named(refusal(write(tmp_path, kind, COCO, anywhere(COCO, 3), "thousand"))) == {"thousand"}


@pytest.mark.parametrize("kind", STANDARD)
def test_few_shares_of_a_thousand_are_noted_on_large_images(tmp_path: Path, kind: str) -> None:
    """Three boxes of pixels may well lie there, so they are read; but it is said."""
    table = read_boxes(write(tmp_path, kind, LARGE, anywhere(LARGE, 3), "thousand"), None)
    assert len(table.boxes) == 3
    assert "give --box-format thousand" in table.note


@pytest.mark.parametrize(
    ("form", "name"), [("normalized widths", "normalized"), ("thousand widths", "thousand")]
)
@pytest.mark.parametrize("kind", STANDARD)
def test_shares_with_widths_are_to_be_written_as_corners(
    tmp_path: Path, kind: str, form: str, name: str
) -> None:
    sentence = refusal(write(tmp_path, kind, COCO, anywhere(COCO, 60), form))
    assert f"write them as {MEANING[name]} and give --box-format {name}" in sentence


@pytest.mark.parametrize("form", ["xywh", "normalized", "thousand"])
def test_slips_do_not_hide_the_format(tmp_path: Path, form: str) -> None:
    """Three boxes of a hundred are something else."""
    path = write(tmp_path, "jsonl", COCO, anywhere(COCO, 97), form)
    junk = [[500, 100, 20, 30], [5, 5, 5, 5], [-70, 2000, 90, 3000]]
    path.write_text(
        "\n".join([path.read_text(), *(json.dumps({"image": "0.png", "bbox": box}) for box in junk)])
    )
    assert named(refusal(path)) == {form}


@pytest.mark.parametrize("form", ["xywh", "normalized", "thousand"])
def test_six_hundred_thousand_boxes(form: str) -> None:
    sizes = np.array(COCO)
    boxes = anywhere(COCO, 2000)
    raw = np.tile([written(box, COCO[image], form) for image, box in boxes], (300, 1))
    sides = np.tile(sizes[[image for image, _ in boxes]].astype(float), (300, 1))
    assert len(raw) == 600_000
    with pytest.raises(UserError) as caught:
        check_standard(raw, sides, "xyxy", "boxes.jsonl", lambda chosen: f"line {chosen[0] + 1}")
    assert named(str(caught.value)) == {form}


def test_the_sentence_says_what_cannot_be_and_where(tmp_path: Path) -> None:
    (tmp_path / "boxes.jsonl").write_text("")
    path = write(
        tmp_path,
        "jsonl",
        [(640, 480)],
        [(0, [100.0, 200.0, 130.0, 220.0]), (0, [5.0, 5.0, 60.0, 70.0])] * 2,
        "xywh",
    )
    assert refusal(path) == (
        f"{path}: 2 of its 4 boxes cannot be x1, y1, x2, y2 in pixels of their images: 2 reversed (first: "
        "boxes.jsonl line 1); give --box-format "
        "xywh if they are x, y, width, height in pixels, and --box-format xyxy to read them as x1, y1, x2, "
        "y2 in pixels all the same"
    )
    assert read_boxes(path, None, "xyxy").dropped_text() == "2 reversed (first: boxes.jsonl line 1)"


# ---- the command


def test_a_run_in_shares_is_refused_and_says_what_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "jsonl", COCO, anywhere(COCO, 30), "normalized")
    arguments = ["--data", str(path), "--out", str(tmp_path / "run"), "--steps", "1"]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert "give --box-format normalized" in error
    assert not (tmp_path / "run").exists()
    assert evaluate.main(["--data", str(path)]) == 2
    assert "give --box-format normalized" in capsys.readouterr().err


def test_a_run_remembers_the_format_of_its_data(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = parse(["--data", str(tmp_path / "boxes.jsonl"), "--box-format", "thousand"])
    assert config.box_format == "thousand"
    (run / "config.json").write_text(json.dumps(vars(config)))
    assert parse(["--resume", str(run)]).box_format == "thousand"
    assert parse(["--resume", str(run), "--data", str(tmp_path / "boxes.jsonl")]).box_format == "thousand"
    assert parse(["--resume", str(run), "--data", str(tmp_path / "other.json")]).box_format == "auto", (
        "it says nothing about another file"
    )
    assert (
        parse(
            ["--resume", str(run), "--data", str(tmp_path / "other.json"), "--box-format", "xyxy"]
        ).box_format
        == "xyxy"
    )
