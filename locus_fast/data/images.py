"""Any image file to upright RGB bytes, or one sentence that says what is wrong with it.

What becomes of what: the EXIF orientation is applied, so that an image stands as viewers show it;
transparency is laid on white; 16-bit grey is divided by 257 (65535 becomes 255); float grey is taken as 0..1
if it lies there and as 0..255 otherwise; CMYK is converted without a colour profile; of an animation the
first frame is taken. Truncated files are refused, never filled with grey.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from locus_fast.config.settings import MAX_PIXELS
from locus_fast.errors import UserError

MIN_SIDE = 16  # px: the smallest crop that the task cuts must fit
MAX_ASPECT = 200  # the vision processors refuse longer images

_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """An image file that cannot be used; the message is one sentence that names the file."""


def load_rgb(path: str | Path) -> np.ndarray:
    """The image at `path`, upright, as uint8 [height, width, 3] RGB.

    Raises ImageError for a file that is missing, empty, truncated, damaged or not an image, that would decode
    to more than 178 megapixels (refused before decoding), that is narrower than 16 px, or more than 200 times
    as long as wide.
    """
    with _opened(path) as image:
        image.load()
        # after load(): Pillow turns TIFFs itself there, and a PNG may keep its EXIF behind the pixels
        turn = _TURNS.get(_orientation(image))
        rgb = _to_rgb(image, path)
        return np.array(rgb if turn is None else rgb.transpose(turn))


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in pixels of the upright image, from the file's header alone; raises ImageError for
    what a header can show to be wrong."""
    with _opened(path) as image:
        width, height = image.size
        # Pillow gives a TIFF's size upright. Its PNG class would decode the whole image to look for EXIF
        # behind the pixels: the base class does not.
        sideways = image.format != "TIFF" and _orientation(image, header_only=True) in _SIDEWAYS
        return (height, width) if sideways else (width, height)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The image file opened by Pillow, its size checked; whatever goes wrong inside the block leaves as an
    ImageError."""
    _refuse_no_bytes(Path(path))
    _mute_pillow()
    try:
        with Image.open(path) as image:
            _refuse_size(path, *image.size)
            yield image
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise _too_many_pixels(path) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{path} is not an image, or its first bytes are damaged: remove it or replace it"
        ) from None
    except PermissionError:
        raise ImageError(f"image {path} may not be read: correct its permissions") from None
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more for damaged
    # files
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ImageError(
            f"image {path} is truncated or damaged ({reason}): fetch it again or remove it"
        ) from None


def _mute_pillow() -> None:
    """Silence Pillow's own warnings, and nobody else's; `warnings.catch_warnings` would not do, as it is not
    safe in loader threads."""
    if not any(
        action == "ignore" and getattr(module, "pattern", None) == r"PIL\b"
        for action, _, _, module, _ in warnings.filters
    ):
        warnings.filterwarnings("ignore", module=r"PIL\b")


def _refuse_no_bytes(path: Path) -> None:
    try:
        if not path.exists():
            raise ImageError(
                f"image {path} does not exist: correct its name or the folder given with --images"
            )
        if not path.is_file():
            raise ImageError(f"image {path} is not a file: give an image file")
        if path.stat().st_size == 0:
            raise ImageError(f"image {path} is empty (zero bytes): fetch it again or remove it")
    except OSError as error:
        raise ImageError(
            f"image {path} cannot be reached ({error.strerror}): correct its name or its permissions"
        ) from None


def _refuse_size(path: str | Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _too_many_pixels(path)
    short, long = sorted((width, height))
    if short < MIN_SIDE:
        raise ImageError(
            f"image {path} is {width}x{height} pixels, too small for a crop of {MIN_SIDE} pixels: remove it "
            "or give a larger one"
        )
    if long > MAX_ASPECT * short:
        raise ImageError(
            f"image {path} is {width}x{height} pixels, more than {MAX_ASPECT} times as long as wide: remove "
            "it or cut it up"
        )


def _too_many_pixels(path: str | Path) -> ImageError:
    return ImageError(
        f"image {path} has more than {MAX_PIXELS // 1_000_000} megapixels: shrink it or remove it"
    )


def _orientation(image: Image.Image, *, header_only: bool = False) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 if there is none or the EXIF block cannot be read, as viewers
    do."""
    try:
        exif = Image.Image.getexif(image) if header_only else image.getexif()
        return int(exif.get(_ORIENTATION, 1))
    # a broken EXIF block raises anything from struct.error to SyntaxError, and says nothing about the pixels
    except Exception:
        return 1


def _to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    """A loaded image of any mode as an image of mode RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_grey_bytes(np.asarray(image))).convert("RGB")
    try:
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return image.convert("RGB")
    except ValueError:
        raise ImageError(
            f"image {path} has colour mode {image.mode}, which does not convert to RGB: save it as an RGB "
            "image"
        ) from None


def _grey_bytes(values: np.ndarray) -> np.ndarray:
    """Grey of 16-bit range (any integer type) or float, [height, width], as uint8; what lies outside the
    range is clipped, and NaN is black."""
    if values.dtype.kind in "iu":
        return ((np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
    finite = np.nan_to_num(values.astype(np.float32), nan=0.0)
    scale = 255.0 if finite.max() <= 1.0 else 1.0
    return np.rint(np.clip(finite * scale, 0.0, 255.0)).astype(np.uint8)
