"""What curve.png and samples.png show, read off the figures that are saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from locus_fast.data.example import Example
from locus_fast.run.evaluation import Evaluation
from locus_fast.run.pictures import COLOURS, draw_curve, draw_samples


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


# ---- the curve


def row(
    step: int, kl: float | None = 0.01, norm: float | None = 0.3, reward: float = 0.5, **more: Any
) -> dict[str, Any]:
    return {
        "step": step,
        "reward": reward,
        "iou": 0.4,
        "valid": 1.0,
        "kl": kl,
        "grad_norm": norm,
        "dropped_step": False,
        **more,
    }


def curve(folder: Path, saved: list[Figure], rows: list[dict[str, Any]]) -> Figure:
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    draw_curve(folder / "metrics.jsonl", folder / "curve.png")
    return saved[-1]


def test_a_run_of_one_step_shows_its_points(tmp_path: Path, saved: list[Figure]) -> None:
    figure = curve(tmp_path, saved, [row(1)])
    for axis in figure.axes:
        for line in axis.lines:
            assert line.get_marker() not in ("", "None", None), "a line through one point has no length"
            (x,), (y,) = line.get_data()
            assert axis.get_xlim()[0] < x < axis.get_xlim()[1]
            assert axis.get_ylim()[0] < y < axis.get_ylim()[1]
        assert all(float(tick).is_integer() for tick in axis.get_xticks())


def test_long_runs_are_lines_without_points(tmp_path: Path, saved: list[Figure]) -> None:
    figure = curve(tmp_path, saved, [row(step) for step in range(1, 401)])
    assert {line.get_marker() for axis in figure.axes for line in axis.lines} <= {"", "None"}


@pytest.mark.parametrize("kls", [[0.0], [0.0, 1e-5, 1e-3], [0.0, 0.0]])
def test_a_kl_of_zero_lies_on_the_axis(tmp_path: Path, saved: list[Figure], kls: list[float]) -> None:
    axis = curve(tmp_path, saved, [row(step + 1, kl) for step, kl in enumerate(kls)]).axes[1]
    line = next(line for line in axis.lines if line.get_label().startswith("KL"))
    shown = axis.transData.transform(np.column_stack(line.get_data()))
    assert np.isfinite(shown).all(), "a logarithm of 0 is nowhere"
    low, high = axis.bbox.y0, axis.bbox.y1
    assert ((shown[:, 1] >= low) & (shown[:, 1] <= high)).all()
    heights = shown[:, 1].tolist()
    assert heights == sorted(heights)


def test_update_is_logarithmic_where_it_can_be(tmp_path: Path, saved: list[Figure]) -> None:
    assert curve(tmp_path, saved, [row(1, 1e-5), row(2, 1e-2)]).axes[1].get_yscale() == "log"


def test_dropped_steps_leave_a_gap_and_are_counted(tmp_path: Path, saved: list[Figure]) -> None:
    rows = [row(1), row(2, norm=0.0, dropped_step=True), row(3, norm=None, dropped_step=True), row(4)]
    axis = curve(tmp_path, saved, rows).axes[1]
    norm = next(line for line in axis.lines if line.get_label() == "gradient norm")
    assert np.isnan(np.asarray(norm.get_ydata(), float)).tolist() == [False, True, True, False]
    assert "2 of 4 steps dropped" in axis.get_title()
    assert axis.get_yscale() == "log"


def test_rewards_below_zero_are_on_the_picture(tmp_path: Path, saved: list[Figure]) -> None:
    low, high = curve(tmp_path, saved, [row(1, reward=-0.6), row(2, reward=1.7)]).axes[0].get_ylim()
    assert low < -0.6
    assert high > 1.7


# ---- held-out examples

SIDE = 200


class Grounds:
    """Held-out images of one colour each, with the same box."""

    def __init__(self, colours: list[tuple[int, int, int]], box: tuple[float, float, float, float]) -> None:
        self.colours, self.box, self.held_out_count = colours, box, len(colours)

    def held_out(self, index: int) -> Example:
        image = np.full((SIDE, SIDE, 3), self.colours[index], np.uint8)
        return Example(image, image[:20, :20], self.box, "small", str(index))

    def train(self, index: int) -> Example:
        raise NotImplementedError

    def describe(self) -> str:
        return ""


def answers(boxes: list[list[float] | None]) -> Evaluation:
    valid = torch.tensor([box is not None for box in boxes])
    return Evaluation(
        torch.tensor([box or [0.0] * 4 for box in boxes]),
        valid,
        torch.zeros(len(boxes)),
        ("small",) * len(boxes),
    )


def luminance(rgb: np.ndarray) -> np.ndarray:
    """WCAG 2's relative luminance of [..., 3] in 0..255."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def pictures(figure: Figure) -> list[Any]:
    return [axis for axis in figure.axes if axis.get_title()]


def boxes_of(axis: Any) -> dict[str, Rectangle]:
    from matplotlib.colors import to_hex

    names = {colour: name for name, colour in COLOURS.items()}
    return {
        names[to_hex(patch.get_edgecolor())]: patch for patch in axis.patches if isinstance(patch, Rectangle)
    }


@pytest.mark.parametrize(
    "box", [(60.0, 70.0, 140.0, 150.0), (90.0, 90.0, 108.0, 106.0)], ids=["small", "tiny"]
)
def test_the_true_box_stands_out_on_any_ground(
    tmp_path: Path, saved: list[Figure], box: tuple[float, float, float, float]
) -> None:
    """Some tone of its line has a contrast of 3 or more with the ground, as WCAG 2 asks of graphics, along
    all four edges."""
    grounds = [
        (255, 255, 255),
        (0, 0, 0),
        (118, 118, 118),
        (187, 187, 187),
        (0, 208, 96),
        (255, 149, 0),
        (255, 45, 120),
        (40, 120, 40),
    ]
    draw_samples(Grounds(grounds, box), answers([None] * 8), answers([None] * 8), tmp_path / "samples.png")
    (figure,) = saved
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(float)
    x1, y1, x2, y2 = box
    for axis, ground in zip(pictures(figure), grounds, strict=True):
        for x, y in (((x1 + x2) / 2, y1), ((x1 + x2) / 2, y2), (x1, (y1 + y2) / 2), (x2, (y1 + y2) / 2)):
            across, up = axis.transData.transform((x - 0.5, y - 0.5)).round().astype(int)
            near = luminance(pixels[-up - 4 : -up + 4, across - 3 : across + 4])
            own = luminance(np.array(ground, float))
            contrast = (np.maximum(near, own) + 0.05) / (np.minimum(near, own) + 0.05)
            assert contrast.max() >= 3, (ground, x, y)


def test_the_legend_shows_the_lines_as_they_are_drawn(tmp_path: Path, saved: list[Figure]) -> None:
    box = [60.0, 70.0, 140.0, 150.0]
    draw_samples(Grounds([(9, 9, 9)], tuple(box)), answers([box]), answers([box]), tmp_path / "samples.png")
    (figure,) = saved
    (axis,) = pictures(figure)
    (legend,) = figure.legends
    drawn = boxes_of(axis)
    handles = dict(zip([text.get_text() for text in legend.get_texts()], legend.get_lines(), strict=True))
    assert handles.keys() == drawn.keys() == COLOURS.keys()
    for name, handle in handles.items():
        assert handle._dash_pattern == drawn[name]._dash_pattern, name  # type: ignore[attr-defined]
        assert handle.get_linewidth() == drawn[name].get_linewidth(), name
    solid, base, trained = (drawn[name]._dash_pattern for name in COLOURS)  # type: ignore[attr-defined]
    assert solid == (0, None)
    assert base[1] == trained[1]
    assert abs(base[0] - trained[0]) == base[1][0] == base[1][1], (
        "of equal boxes each shows in the other's gaps"
    )


def test_a_reply_without_a_box_is_said(tmp_path: Path, saved: list[Figure]) -> None:
    box, beyond = [60.0, 70.0, 140.0, 150.0], [210.0, 70.0, 260.0, 150.0]
    cues = Grounds([(9, 9, 9)] * 3, tuple(box))  # type: ignore[arg-type]
    draw_samples(cues, answers([None, box, box]), answers([None, box, beyond]), tmp_path / "samples.png")
    said = [[text.get_text() for text in axis.texts] for axis in pictures(saved[0])]
    assert said == [["base: no box", "trained: no box"], [], ["trained: outside"]]
    assert set(boxes_of(pictures(saved[0])[0])) == {"true box"}


def test_tiny_objects_are_shown_enlarged(tmp_path: Path, saved: list[Figure]) -> None:
    for box, count in (
        ((60.0, 70.0, 140.0, 150.0), 1),
        ((90.0, 90.0, 108.0, 106.0), 2),
        ((0.0, 180.0, 16.0, 200.0), 2),
    ):
        found = [box[0] + 2, box[1] + 2, box[2] + 2, box[3] + 2]
        draw_samples(Grounds([(9, 9, 9)], box), answers([found]), answers([None]), tmp_path / "samples.png")
        insets = pictures(saved[-1])[0].child_axes
        assert len(insets) == count
        for zoom in insets[1:]:
            (left, right), (bottom, top) = zoom.get_xlim(), zoom.get_ylim()
            assert left <= box[0] - 0.5 < box[2] - 0.5 <= right
            assert top <= box[1] - 0.5 < box[3] - 0.5 <= bottom
            assert max(box[2] - box[0], box[3] - box[1]) >= (right - left) / 4, (
                "the object fills a quarter of the window or more"
            )
            assert set(boxes_of(zoom)) == {"true box", "base"}


def test_a_true_box_on_the_border_is_whole(tmp_path: Path, saved: list[Figure]) -> None:
    draw_samples(
        Grounds([(9, 9, 9)], (0.0, 0.0, 60.0, 60.0)),
        answers([None]),
        answers([None]),
        tmp_path / "samples.png",
    )
    assert not boxes_of(pictures(saved[0])[0])["true box"].get_clip_on()


def test_both_pictures_are_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1, 0.0)) + "\n")
    draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    draw_samples(
        Grounds([(9, 9, 9)], (0.0, 0.0, 60.0, 60.0)),
        answers([None]),
        answers([None]),
        tmp_path / "samples.png",
    )
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("curve.png", "samples.png"))
