"""`load_rgb` on every kind of image file, good and bad."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from locus_fast.data.images import ImageError, image_size, load_rgb

RED, WHITE = (255, 0, 0), (255, 255, 255)


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, channels), np.uint8)


def png(path: Path, width: int, height: int) -> Path:
    """A PNG whose header promises width x height pixels, with hardly any behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"0"))
        + chunk(b"IEND", b"")
    )
    return path


def is_all(image: np.ndarray, colour: tuple[int, int, int], within: int = 0) -> bool:
    assert image.dtype == np.uint8
    assert image.ndim == 3
    return bool((np.abs(image.astype(int) - colour) <= within).all())


def test_rgb_comes_back_as_it_was_and_writable(tmp_path: Path) -> None:
    pixels = noise(20, 30)
    loaded = load_rgb(saved(Image.fromarray(pixels), tmp_path / "a.png"))
    np.testing.assert_array_equal(loaded, pixels)
    loaded[0, 0] = 1


def test_path_may_be_text(tmp_path: Path) -> None:
    assert load_rgb(str(saved(Image.new("RGB", (20, 30)), tmp_path / "a.png"))).shape == (30, 20, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(noise(20, 30)), tmp_path / "a.png", exif=exif)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(load_rgb(path), upright)
    assert image_size(path) == upright.shape[1::-1]


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".webp"])
def test_exif_orientation_in_other_formats(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored left edge is the upright top
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = RED
    path = saved(Image.fromarray(pixels), tmp_path / f"a{suffix}", exif=exif)
    loaded = load_rgb(path)
    assert loaded.shape == (64, 32, 3)
    assert is_all(loaded[:24], RED, within=8)
    assert is_all(loaded[40:], (0, 0, 0), within=8)
    assert image_size(path) == (32, 64)


def test_broken_exif_leaves_the_image_as_stored(tmp_path: Path) -> None:
    pixels = noise(20, 30)
    path = saved(Image.fromarray(pixels), tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(load_rgb(path), pixels)
    assert image_size(path) == (30, 20)


def test_palette(tmp_path: Path) -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 255, 255, 0, 0])
    assert is_all(load_rgb(saved(image, tmp_path / "a.png")), RED)


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"], ids=["one index", "alpha of each"])
def test_palette_with_transparency_lies_on_white(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.new("P", (20, 20), 0)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.paste(1, (10, 0, 20, 20))
    loaded = load_rgb(saved(image, tmp_path / "a.png", transparency=transparency))
    assert is_all(loaded[:, :10], WHITE)
    assert is_all(loaded[:, 10:], RED)


def test_transparent_colour_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 20), (1, 2, 3))
    image.paste(RED, (10, 0, 20, 20))
    loaded = load_rgb(saved(image, tmp_path / "a.png", transparency=(1, 2, 3)))
    assert is_all(loaded[:, :10], WHITE)
    assert is_all(loaded[:, 10:], RED)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 51), (204, 204, 204)),
        ("1", 1, WHITE),
        ("1", 0, (0, 0, 0)),
    ],
)
def test_alpha_and_grey(
    tmp_path: Path, mode: str, colour: int | tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    assert is_all(load_rgb(saved(Image.new(mode, (20, 20), colour), tmp_path / "a.png")), expected, within=1)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (32768, 128), (65535, 255)])
def test_16_bit_grey_is_scaled(tmp_path: Path, suffix: str, value: int, expected: int) -> None:
    path = saved(Image.fromarray(np.full((20, 20), value, np.uint16)), tmp_path / f"a{suffix}")
    assert is_all(load_rgb(path), (expected, expected, expected))


def test_32_bit_grey_is_scaled_and_clipped(tmp_path: Path) -> None:
    values = np.repeat(np.array([[-5, 257, 65535, 1_000_000]], np.int32), 20, axis=0).repeat(5, axis=1)
    loaded = load_rgb(saved(Image.fromarray(values), tmp_path / "a.tif"))
    assert loaded[0, ::5, 0].tolist() == [0, 1, 255, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0, np.nan], [0, 128, 255, 0]), ([-3.0, 100.4, 255.0, 900.0], [0, 100, 255, 255])],
)
def test_float_grey(tmp_path: Path, values: list[float], expected: list[int]) -> None:
    pixels = np.tile(np.array(values, np.float32).repeat(5), (20, 1))
    loaded = load_rgb(saved(Image.fromarray(pixels), tmp_path / "a.tif"))
    assert loaded[0, ::5].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("suffix", [".jpg", ".tif"], ids=["Adobe JPEG, stored inverted", "TIFF"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    path = saved(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), tmp_path / f"a{suffix}")
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    assert is_all(load_rgb(path), RED, within=3)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), (0, 255, 0))
    assert is_all(load_rgb(saved(first, tmp_path / "a.gif", save_all=True, append_images=[second])), RED)


def test_pillow_is_quiet(tmp_path: Path) -> None:
    # Pillow warns from 89 megapixels on
    path = saved(Image.new("1", (10_000, 9_000)), tmp_path / "large.png")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert image_size(path) == (10_000, 9_000)
        warnings.warn("not from Pillow", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["not from Pillow"]


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """name: (file, what the sentence must say)."""
    empty, text, cut_jpeg, cut_png = (
        folder / name for name in ("empty.jpg", "text.png", "cut.jpg", "cut.png")
    )
    empty.write_bytes(b"")
    text.write_text("this is not an image")
    for path in (cut_jpeg, cut_png):
        whole = saved(Image.fromarray(noise(200, 200)), path).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    broken = folder / "broken.png"
    whole = cut_png.read_bytes()
    broken.write_bytes(whole[:60] + bytes(100) + whole[160:])
    return {
        "missing": (folder / "nowhere.jpg", "does not exist"),
        "folder": (folder, "is not a file"),
        "empty": (empty, "zero bytes"),
        "text": (text, "is not an image"),
        "truncated jpeg": (cut_jpeg, "truncated"),
        "truncated png": (cut_png, "truncated"),
        "broken png": (broken, "damaged"),
        "bomb": (png(folder / "bomb.png", 20_000, 20_000), "178 megapixels"),
        "one pixel": (saved(Image.new("RGB", (1, 1)), folder / "one.png"), "1x1 pixels, too small"),
        "narrow": (saved(Image.new("RGB", (20_000, 10)), folder / "narrow.png"), "20000x10 pixels"),
        "long": (
            saved(Image.new("RGB", (16, 3_201)), folder / "long.png"),
            "16x3201 pixels, more than 200 times",
        ),
    }


BAD = [
    "missing",
    "folder",
    "empty",
    "text",
    "truncated jpeg",
    "truncated png",
    "broken png",
    "bomb",
    "one pixel",
    "narrow",
    "long",
]


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_one_sentence_that_names_it(tmp_path: Path, kind: str) -> None:
    path, says = bad_files(tmp_path)[kind]
    with pytest.raises(ImageError) as caught:
        load_rgb(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert says in sentence
    assert "\n" not in sentence
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_every_bad_file_is_tried(tmp_path: Path) -> None:
    assert list(bad_files(tmp_path)) == BAD


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".gif", ".tif"])
def test_truncation_anywhere_in_any_format(tmp_path: Path, suffix: str, keep: float) -> None:
    path = saved(Image.fromarray(noise(100, 100)), tmp_path / f"a{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ImageError, match=r"a\."):
        load_rgb(path)


@pytest.mark.parametrize("size", [(16, 16), (16, 3_200)])
def test_smallest_and_longest_that_pass(tmp_path: Path, size: tuple[int, int]) -> None:
    assert load_rgb(saved(Image.new("RGB", size), tmp_path / "a.png")).shape == (size[1], size[0], 3)


def test_bomb_is_refused_even_where_pillow_is_told_to_allow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match=r"bomb\.png has more than 178 megapixels"):
        load_rgb(png(tmp_path / "bomb.png", 20_000, 20_000))


def test_size_decodes_no_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.new("RGB", (20, 30)), tmp_path / "a.png")
    decoded: list[object] = []
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: decoded.append(self))
    assert image_size(path) == (20, 30)
    assert decoded == []


def test_size_of_a_bad_header(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"bomb\.png has more than 178 megapixels"):
        image_size(png(tmp_path / "bomb.png", 20_000, 20_000))
    with pytest.raises(ImageError, match="does not exist"):
        image_size(tmp_path / "nowhere.png")
