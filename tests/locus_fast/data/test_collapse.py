"""Sets that would teach one constant answer are refused, and others are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from locus_fast import train
from locus_fast.config import parse
from locus_fast.data import read_boxes
from locus_fast.data.collapse import refuse_collapsed
from locus_fast.data.cutting import CueRecipe
from locus_fast.errors import UserError
from locus_fast.run.examples import cue_source
from tests.locus_fast.cue_cases import recipe

SIZES = [(640, 480), (480, 640), (500, 375), (600, 600)]
Box = list[float]  # xyxy in pixels


def data(folder: Path, boxes: list[tuple[int, Box]], sizes: list[tuple[int, int]] = SIZES) -> Path:
    for image, size in enumerate(sizes):
        Image.new("1", size).save(folder / f"{image}.png")
    path = folder / "boxes.jsonl"
    path.write_text("\n".join(json.dumps({"image": f"{image}.png", "bbox": box}) for image, box in boxes))
    return path


def anywhere(count: int, seed: int = 0, side: tuple[float, float] = (17, 40)) -> list[tuple[int, Box]]:
    rng, boxes = np.random.default_rng(seed), []
    for place in range(count):
        image = place % len(SIZES)
        size = rng.uniform(*side, 2)
        corner = rng.uniform(0, 1, 2) * (SIZES[image] - size)
        boxes.append((image, [*corner.tolist(), *(corner + size).tolist()]))
    return boxes


def refuse(path: Path, box_format: str = "auto", recipe: CueRecipe = recipe()) -> None:  # noqa: B008
    refuse_collapsed(read_boxes(path, None, box_format), recipe)


def refusal(path: Path, box_format: str = "auto", recipe: CueRecipe = recipe()) -> str:  # noqa: B008
    with pytest.raises(UserError) as caught:
        refuse(path, box_format, recipe)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: ")
    assert "--box-format" in sentence
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("box_format", ["xyxy", "thousand"])
def test_shares_of_one_read_as_something_else_are_refused(tmp_path: Path, box_format: str) -> None:
    """By insisting on another format: every cue would be the first corner."""
    shares = [(image, (np.array(box) / np.tile(SIZES[image], 2)).tolist()) for image, box in anywhere(60)]
    path = data(tmp_path, shares)
    assert "60 of 60 boxes are less than a pixel wide and high" in refusal(path, box_format)
    refuse(path, "normalized")


def test_whole_pixels_in_one_corner_are_refused(tmp_path: Path) -> None:
    """As rounding makes them of shares: one pixel each, grown to the same 16 x 16."""
    sentence = refusal(
        data(
            tmp_path,
            [(image, [0, 0, 1 + place % 3, 1 + place % 2]) for place, (image, _) in enumerate(anywhere(60))],
        ),
        "xyxy",
    )
    assert (
        "60 of 60 cues would show the same place, about [0, 0, 16, 16] in pixels, so that one constant "
        "answer would do" in sentence
    )


@pytest.mark.parametrize(
    ("same", "other", "refused"),
    [(31, 29, True), (30, 30, False), (6, 54, False), (4, 0, True), (3, 0, False), (4, 3, True)],
)
def test_more_than_half_at_one_place_is_refused(tmp_path: Path, same: int, other: int, refused: bool) -> None:
    """A camera that sees its one sign at one place, give or take a pixel."""
    rng = np.random.default_rng(0)
    sign = [
        (place % 4, (np.array([300, 100, 330, 125]) + rng.integers(-1, 2, 4)).tolist())
        for place in range(same)
    ]
    path = data(tmp_path, [*sign, *anywhere(other)])
    if refused:
        sentence = refusal(path)
        assert f"{same} of {same + other} cues would show the same place, about [" in sentence
        place = [float(value) for value in sentence.split("about [")[1].split("]")[0].split(",")]
        np.testing.assert_allclose(place, [300, 100, 330, 125], rtol=0, atol=1)
    else:
        refuse(path)


def test_one_place_in_parts_of_images_of_all_sizes_is_refused(tmp_path: Path) -> None:
    boxes = [
        (place % 4, (np.tile(SIZES[place % 4], 2) * np.array([0.5, 0.25, 0.6, 0.35])).tolist())
        for place in range(40)
    ]
    assert "40 of 40 cues would show the same place, about [0.5, 0.25, 0.6" in refusal(data(tmp_path, boxes))
    assert "in parts of the image" in refusal(data(tmp_path, boxes))


def test_size_classes_weigh_what_they_weigh_in_the_mix(tmp_path: Path) -> None:
    """Ten tiny boxes of one place and fifty small ones anywhere: with tiny at 0.7 seven of ten examples are
    the place."""
    path = data(
        tmp_path,
        [*[(place % 4, [20.0, 30.0, 40.0, 50.0]) for place in range(10)], *anywhere(50, side=(80, 90))],
    )
    assert "10 of 60 cues would show the same place" in refusal(path)
    refuse(path, recipe=recipe(mix=(0.3, 0.7, 0.0)))
    refuse(path, recipe=recipe(mix=(0.0, 1.0, 0.0)))


def test_a_class_of_a_few_boxes_is_no_collapse(tmp_path: Path) -> None:
    """One tiny box at 0.7 of the mix: seven of ten examples are that one, but it shows nothing of how boxes
    are written."""
    refuse(data(tmp_path, [(0, [20.0, 30.0, 40.0, 50.0]), *anywhere(50, side=(80, 90))]))


def test_boxes_drawn_on_larger_images_are_refused(tmp_path: Path) -> None:
    """The images were made half as large and the boxes were not: most lie outside, or are cut at the
    border."""
    boxes = [(image, (2 * np.array(box)).tolist()) for image, box in anywhere(300, side=(60, 120))]
    path = data(tmp_path, boxes)
    gone = sum(lost(box, SIZES[image]) > 0.1 for image, box in boxes)
    assert gone > 150
    sentence = refusal(path, "xyxy")
    assert (
        f"{gone} of 300 boxes lie outside their images or lose over a tenth of their area at the border"
        in sentence
    )


def lost(box: Box, size: tuple[int, int]) -> float:
    """The part of a box that lies outside its image."""
    inside = [max(0.0, min(box[k + 2], size[k]) - max(box[k], 0.0)) for k in range(2)]
    return 1 - inside[0] * inside[1] / ((box[2] - box[0]) * (box[3] - box[1]))


@pytest.mark.parametrize(
    "boxes",
    [
        anywhere(200),
        anywhere(200, side=(3, 6)),
        anywhere(200, side=(1, 2)),
        [
            (image, [box[0] - 0.5, box[1] - 0.5, box[2] + 9, box[3] + 9])
            for image, box in anywhere(200, side=(150, 300))
        ],
        [(image, [box[0], box[1], box[0] + 1, box[1] + 1]) for image, box in anywhere(200)],
    ],
    ids=["small objects", "stars", "specks", "large and hasty", "points of a pixel"],
)
def test_other_sets_are_not_refused(tmp_path: Path, boxes: list[tuple[int, Box]]) -> None:
    refuse(data(tmp_path, boxes), recipe=recipe(mix=(0.5, 0.3, 0.2)))


def test_a_folder_without_boxes_is_not_refused(tmp_path: Path) -> None:
    data(tmp_path, [])
    refuse(tmp_path)


def test_a_run_on_a_collapsed_set_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data(tmp_path, [(place % 4, [300, 100, 330, 125]) for place in range(40)])
    assert train.main(["--data", str(path), "--out", str(tmp_path / "run"), "--steps", "1"]) == 2
    assert "one constant answer would do" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="one constant answer would do"):
        cue_source(parse(["--data", str(path)]))
