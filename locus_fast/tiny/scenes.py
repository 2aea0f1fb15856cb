"""Procedurally drawn scenes: the embedded default's data, a pure function of (seed, index).

A scene is a textured ground with 5 to 12 separate objects of varied shape, colour, pattern and size; about
half of them are distractors that share a colour or a shape with an earlier one. The cue is one object with up
to 10% of padding, rescaled by 0.8 to 2.0, as the LOCUS recipe does for tiny cues. Four image sizes and aspect
ratios are mixed.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from locus_fast.data.cutting import size_class_of
from locus_fast.data.example import Example

IMAGE_SIZES = ((128, 128), (160, 112), (112, 160), (144, 128))  # (width, height) in pixels
SHAPES = ("rectangle", "ellipse", "triangle", "diamond", "cross", "ring")
PATTERNS = ("plain", "stripes", "halves", "dot")
OBJECTS = (5, 12)  # fewest and most objects of a scene
SIDE = (12, 32)  # shortest and longest side of an object, pixels
PADDING = 0.10  # of the object's side, the most that a cue shows of the ground on each side
SCALE = (0.8, 2.0)  # of the cue against the scene
SMOOTH = 2  # objects are drawn this much larger and averaged down

Box = tuple[int, int, int, int]
Look = tuple[int, int, np.ndarray, np.ndarray]  # shape, pattern, two RGB colours


def draw_scene(
    rng: np.random.Generator, size: tuple[int, int], objects: tuple[int, int]
) -> tuple[np.ndarray, list[Box]]:
    """An RGB scene (uint8 [height, width, 3]) of `size` (width, height) and the xyxy boxes of its objects,
    drawn without overlap."""
    width, height = size
    scene = draw_ground(rng, width, height)
    boxes: list[Box] = []
    looks: list[Look] = []
    wanted = int(rng.integers(objects[0], objects[1] + 1))
    for _ in range(40 * wanted):
        if len(boxes) == wanted:
            break
        w, h = (int(side) for side in rng.integers(SIDE[0], SIDE[1] + 1, 2))
        x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        if any(x < b[2] + 2 and b[0] < x + w + 2 and y < b[3] + 2 and b[1] < y + h + 2 for b in boxes):
            continue
        looks.append(choose_look(rng, looks))
        boxes.append((x, y, x + w, y + h))
        patch, coverage = draw_object(looks[-1], w, h)
        region = scene[y : y + h, x : x + w]
        region += (patch - region) * coverage
    scene += rng.normal(0.0, 2.0, scene.shape).astype(np.float32)
    return np.clip(scene, 0, 255).astype(np.uint8), boxes


def draw_ground(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A smooth random texture, float32 [height, width, 3]."""
    base = rng.uniform(60, 195, 3)
    coarse = base + rng.normal(0, 14, (int(rng.integers(3, 9)), int(rng.integers(3, 9)), 3))
    image = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return np.asarray(image).astype(np.float32)


def choose_look(rng: np.random.Generator, looks: list[Look]) -> Look:
    """A random shape, pattern and two colours; half of the time one of them is shared with an earlier
    object."""
    shape, pattern = int(rng.integers(len(SHAPES))), int(rng.integers(len(PATTERNS)))
    first, second = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
    if looks and rng.random() < 0.5:
        other = looks[int(rng.integers(len(looks)))]
        if rng.random() < 0.5:
            shape = other[0]
        else:
            first = other[2]
    return shape, pattern, first, second


def draw_object(look: Look, w: int, h: int) -> tuple[np.ndarray, np.ndarray]:
    """The colours of an object that fills its w x h box (float32 [h, w, 3]) and its coverage (float32 [h, w,
    1] in 0..1)."""
    shape, pattern, first, second = look
    W, H = w * SMOOTH, h * SMOOTH
    mask = Image.new("L", (W, H), 0)
    pen = ImageDraw.Draw(mask)
    corner = (0, 0, W - 1, H - 1)
    match SHAPES[shape]:
        case "rectangle":
            pen.rectangle(corner, fill=255)
        case "ellipse":
            pen.ellipse(corner, fill=255)
        case "triangle":
            pen.polygon([(0, H - 1), (W // 2, 0), (W - 1, H - 1)], fill=255)
        case "diamond":
            pen.polygon([(0, H // 2), (W // 2, 0), (W - 1, H // 2), (W // 2, H - 1)], fill=255)
        case "cross":
            pen.rectangle((W // 3, 0, W - 1 - W // 3, H - 1), fill=255)
            pen.rectangle((0, H // 3, W - 1, H - 1 - H // 3), fill=255)
        case "ring":
            pen.ellipse(corner, fill=255)
            pen.ellipse((W * 3 // 10, H * 3 // 10, W - 1 - W * 3 // 10, H - 1 - H * 3 // 10), fill=0)
    paint = Image.new("L", (W, H), 0)
    pen = ImageDraw.Draw(paint)
    match PATTERNS[pattern]:
        case "stripes":
            for x in range(0, W, 12):
                pen.rectangle((x, 0, x + 5, H - 1), fill=255)
        case "halves":
            pen.rectangle((0, H // 2, W - 1, H - 1), fill=255)
        case "dot":
            pen.ellipse((W * 3 // 10, H * 3 // 10, W * 7 // 10, H * 7 // 10), fill=255)
    coverage, share = (
        np.asarray(layer.reduce(SMOOTH), dtype=np.float32)[..., None] / 255 for layer in (mask, paint)
    )
    return first * (1 - share) + second * share, coverage


def cut_cue(rng: np.random.Generator, scene: np.ndarray, box: Box) -> tuple[np.ndarray, Box]:
    """The cue of an object and the region it shows: the object's box with padding, rescaled."""
    height, width = scene.shape[:2]
    pads = rng.uniform(0, PADDING, 4) * np.array([box[2] - box[0], box[3] - box[1]] * 2)
    left, top, right, bottom = (round(pad) for pad in pads)
    region = (
        max(0, box[0] - left),
        max(0, box[1] - top),
        min(width, box[2] + right),
        min(height, box[3] + bottom),
    )
    scale = rng.uniform(*SCALE)
    w, h = (max(8, round(scale * side)) for side in (region[2] - region[0], region[3] - region[1]))
    crop = Image.fromarray(scene[region[1] : region[3], region[0] : region[2]])
    return np.asarray(crop.resize((w, h), Image.Resampling.BICUBIC)), region


class SceneCues:
    """The CueSource of drawn scenes. Held-out scenes are the same for every seed and share no random stream
    with training scenes."""

    def __init__(self, seed: int, held_out: int):
        self.seed, self.held_out_count = seed, held_out

    def train(self, index: int) -> Example:
        """Training scene `index` and one of its objects as the cue."""
        return self._example(np.random.default_rng([1, self.seed, index]), f"scene {index}")

    def held_out(self, index: int) -> Example:
        """Held-out scene `index`."""
        return self._example(np.random.default_rng([2, index]), f"held-out scene {index}")

    def describe(self) -> str:
        """One line on what is drawn."""
        return (
            f"drawn scenes of {OBJECTS[0]} to {OBJECTS[1]} objects in {len(IMAGE_SIZES)} image sizes, "
            f"{self.held_out_count} held out"
        )

    def _example(self, rng: np.random.Generator, source: str) -> Example:
        size = IMAGE_SIZES[int(rng.integers(len(IMAGE_SIZES)))]
        scene, boxes = draw_scene(rng, size, OBJECTS)
        box = boxes[int(rng.integers(len(boxes)))]
        cue, region = cut_cue(rng, scene, box)
        left, top, right, bottom = map(float, region)
        return Example(scene, cue, (left, top, right, bottom), size_class_of(box, *size), source)
