"""The pictures of a run: the curve of its steps, and held-out examples with what was found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from locus_fast.data.example import CueSource, Example
from locus_fast.files import written
from locus_fast.run.evaluation import Evaluation

PICTURES = 8  # held-out examples shown in samples.png
COLOURS = {"true box": "#00d060", "base": "#ff9500", "trained": "#ff2d78"}
# of equal boxes each shows in the other's gaps
DASHES = {
    "true box": "-",
    "base": (0, (3, 3)),
    "trained": (3, (3, 3)),
}
MARKED = 30  # steps up to which each is marked by a point: a line of one step is nothing
ZOOMED = 0.15  # of the image's longer side: objects below it are shown enlarged as well
LINE = 2.4  # points that a box's line is wide, without its casing
WINDOW = 2.5  # sides of the object that the enlargement shows
# left, bottom, width, height, in the image's
_INSETS = {
    "cue": (1.03, 0.70, 0.27, 0.28),
    "zoom": (1.03, 0.26, 0.27, 0.36),
}


def draw_curve(metrics: Path, path: Path) -> None:
    """Reward, IoU and valid rate of the rollouts, and KL and gradient norm, over the steps. A dropped step
    leaves a gap."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    if rows:
        figure = curve_figure(rows)
        with written(path):
            figure.savefig(path, dpi=110)
        pyplot().close(figure)


def curve_figure(rows: Sequence[dict[str, Any]]) -> Any:
    """The figure of `draw_curve` for the metrics of steps."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4))
    steps, marker = [row["step"] for row in rows], "o" if len(rows) <= MARKED else ""
    dropped = np.array([bool(row.get("dropped_step")) for row in rows])

    def plot(axis: Any, name: str, label: str) -> np.ndarray:
        values = np.array([row.get(name) for row in rows], float)  # None becomes nan, and leaves a gap
        if axis is right:
            values[dropped] = np.nan
        axis.plot(steps, values, label=label, marker=marker, markersize=4)
        return values

    shares = np.concatenate([plot(left, name, name) for name in ("reward", "iou", "valid")])
    low, high = np.nanmin([0.0, *shares]), np.nanmax([1.0, *shares])  # some rewards lie outside 0 to 1
    left.set(xlabel="step", title="rollouts", ylim=(low - 0.02, high + 0.02))
    sizes = np.concatenate(
        [plot(right, "kl", "KL to the base, nats a token"), plot(right, "grad_norm", "gradient norm")]
    )
    count = int(dropped.sum())
    right.set(xlabel="step", title=f"update, {count} of {len(rows)} steps dropped" if count else "update")
    positive = sizes[sizes > 0]
    if len(positive) and (sizes <= 0).any():  # a logarithm has no 0: below the least value the axis is linear
        right.set_yscale("symlog", linthresh=positive.min(), linscale=0.7)
    elif len(positive):
        right.set_yscale("log")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(rows) == 1:
            axis.set_xlim(steps[0] - 1, steps[0] + 1)
        axis.legend()
    figure.tight_layout()
    return figure


def draw_samples(cues: CueSource, before: Evaluation, after: Evaluation, path: Path) -> None:
    """Held-out images with the true box, the base's box and the trained box; beside each the cue, and small
    objects enlarged."""
    figure = samples_figure(cues, before, after)
    with written(path):
        figure.savefig(path, dpi=100)
    pyplot().close(figure)


def samples_figure(cues: CueSource, before: Evaluation, after: Evaluation) -> Any:
    """The figure of `draw_samples`."""
    plt = pyplot()
    count = min(PICTURES, cues.held_out_count)
    chosen = np.linspace(0, cues.held_out_count - 1, count).round().astype(int).tolist()
    columns = min(4, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.9 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, chosen, strict=False):
        answers = {
            name: part.box[index].tolist() if part.valid[index] else None
            for name, part in (("base", before), ("trained", after))
        }
        draw_sample(axis, cues.held_out(index), answers)
        axis.set_title(f"IoU {before.iou[index]:.2f} to {after.iou[index]:.2f}", fontsize=11)
    handles = [plt.Line2D([], [], **line_style(name, LINE)) for name in COLOURS]
    figure.legend(
        handles, list(COLOURS), loc="lower center", ncols=len(handles), frameon=False, handlelength=3.5
    )
    figure.subplots_adjust(left=0.01, right=0.94, bottom=0.07, top=0.95, wspace=0.36, hspace=0.12)
    return figure


def draw_sample(axis: Any, example: Example, answers: dict[str, list[float] | None]) -> None:
    """One example on an axis. answers: the boxes by the names of COLOURS, xyxy in pixels of the image; None
    is no box."""
    height, width = example.image.shape[:2]
    boxes = {"true box": list(example.box), **{name: box for name, box in answers.items() if box}}
    axis.imshow(example.image)
    axis.set(xticks=[], yticks=[])
    axis.set_axis_on()  # its frame, without which a white image has no end
    draw_boxes(axis, boxes, LINE)
    cue = axis.inset_axes(_INSETS["cue"])
    cue.imshow(example.cue)
    cue.set(xticks=[], yticks=[])
    side = max(example.box[2] - example.box[0], example.box[3] - example.box[1])
    if side < ZOOMED * max(width, height):
        zoom = axis.inset_axes(_INSETS["zoom"])
        zoom.imshow(example.image)
        draw_boxes(zoom, boxes, LINE / 2)
        middle = [(example.box[k] + example.box[k + 2]) / 2 - 0.5 for k in range(2)]
        reach = WINDOW * side / 2
        zoom.set(
            xlim=(middle[0] - reach, middle[0] + reach),
            ylim=(middle[1] + reach, middle[1] - reach),
            xticks=[],
            yticks=[],
        )
        zoom.set_facecolor("0.9")  # where the window reaches over the image's border
        zoom.set_xlabel("enlarged", fontsize=8, labelpad=2)
    missed = [f"{name}: no box" for name, box in answers.items() if not box]
    missed += [
        f"{name}: outside" for name, box in answers.items() if box and not _touches(box, width, height)
    ]
    for line, text in enumerate(missed):
        style = {
            "color": COLOURS[text.split(":")[0]],
            "fontsize": 12,
            "fontweight": "bold",
            "path_effects": casing(1.0),
        }
        axis.text(0.02, 0.97 - 0.1 * line, text, transform=axis.transAxes, va="top", **style)


def draw_boxes(axis: Any, boxes: dict[str, list[float]], width: float) -> None:
    """Boxes by the names of COLOURS, xyxy in pixels, in lines of `width` points; the true box on top and
    whole, though it may lie on the image's border."""
    from matplotlib.patches import Rectangle

    for name, (x1, y1, x2, y2) in reversed(boxes.items()):
        style = line_style(name, width)
        colour, whole = style.pop("color"), name == "true box"
        axis.add_patch(
            Rectangle(
                (x1 - 0.5, y1 - 0.5),
                x2 - x1,
                y2 - y1,
                fill=False,
                edgecolor=colour,
                clip_on=not whole,
                **style,
            )
        )


def line_style(name: str, width: float) -> dict[str, Any]:
    """How a box is drawn, in the picture and in the legend, in a line of `width` points."""
    return {
        "color": COLOURS[name],
        "linewidth": width,
        "linestyle": DASHES[name],
        "path_effects": casing(width),
    }


def casing(width: float) -> list[Any]:
    """Path effects that lay a white and a black edge around what is `width` points wide: one of the two
    stands out on any ground, since black or white has a contrast of 4.5 or more with every colour."""
    from matplotlib.patheffects import Normal, Stroke

    black, white = (
        Stroke(linewidth=width + 2 * edge, foreground=colour)
        for colour, edge in (("black", 1.3), ("white", 0.7))
    )
    return [black, white, Normal()]


def _touches(box: Sequence[float], width: int, height: int) -> bool:
    return box[0] < width and box[1] < height and box[2] > 0 and box[3] > 0


def pyplot() -> Any:
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
