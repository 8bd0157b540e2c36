"""Pictures and masks as they come from the wild: any mode, any orientation, any shape, made into RGB, binary and square."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from moma_lightning.pictures import to_grey, to_rgb

Box = tuple[int, int, int, int]

#: What Pillow raises for files that are cut, damaged, of an unknown kind or absurdly large.
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)

#: Masks stored as JPEG, or resized smoothly by someone, have noise around 0: it is not foreground.
MASK_THRESHOLD = 128

#: A mask whose width to height differs from its picture's by this share or more is not of it.
MASK_TOLERANCE = 0.05


def open_picture(source: bytes | Path, turn: bool = True, at_least: int | None = None) -> Image.Image:
    """Decode a picture completely, turn it as its EXIF says (unless told not to) and convert it to 8-bit RGB.

    at_least: a JPEG may come at a half, a quarter or an eighth of its size, as long as both sides keep so many pixels; its decoder
    then does less work. Transparent parts become white, like the background of I_wb. Raises one of `PICTURE_ERRORS`.
    """
    return to_rgb(_decoded(source, at_least), turn)


def open_mask(source: bytes | Path) -> Image.Image:
    """Decode a mask to mode "L" holding only 0 and 255, cut at `MASK_THRESHOLD`. Raises one of `PICTURE_ERRORS`."""
    return to_grey(_decoded(source), turn=False).point([0] * MASK_THRESHOLD + [255] * (256 - MASK_THRESHOLD))


def fit_mask(mask: Image.Image, size: tuple[int, int], tolerance: float = MASK_TOLERANCE) -> Image.Image:
    """Resize a mask to its picture's (width, height), nearest; ValueError when their proportions differ by `tolerance` or more."""
    if mask.size == size:
        return mask
    stretch = mask.width * size[1] / (mask.height * size[0])
    if not 1 - tolerance < stretch < 1 + tolerance:
        raise ValueError(f"a mask of {mask.width}x{mask.height} does not fit a picture of {size[0]}x{size[1]}")
    return mask.resize(size, Image.Resampling.NEAREST)


def square_box(size: tuple[int, int], subject: Box, rng: np.random.Generator | None = None) -> Box:
    """The square (left, top, right, bottom) to cut from a picture of (width, height) so that the whole subject is in it.

    As large as the picture's short side, at a random place with `rng` and as central as the subject allows without.
    A subject longer than the short side gets a square of its own length, which then reaches beyond the picture on both
    sides of the short axis: nothing is squashed and nothing of the subject is lost.
    """
    left, top, right, bottom = subject
    side = max(min(size), right - left, bottom - top)
    x, y = _offset(size[0], side, left, right, rng), _offset(size[1], side, top, bottom, rng)
    return x, y, x + side, y + side


def cut(picture: Image.Image, box: Box, size: int) -> Image.Image:
    """Cut a box and resize it to size x size: pictures bicubic with white beyond their edge, masks nearest with 0."""
    is_mask = picture.mode == "L"
    square = Image.new(picture.mode, (box[2] - box[0], box[3] - box[1]), 0 if is_mask else "white")
    square.paste(picture, (-box[0], -box[1]))
    return square.resize((size, size), Image.Resampling.NEAREST if is_mask else Image.Resampling.BICUBIC)


def _decoded(source: bytes | Path, at_least: int | None = None) -> Image.Image:
    picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if at_least is not None:
        picture.draft(None, (at_least, at_least))
    picture.load()
    return picture


def _offset(length: int, side: int, start: int, stop: int, rng: np.random.Generator | None) -> int:
    if side >= length:
        return -((side - length) // 2)
    low, high = max(0, stop - side), min(start, length - side)
    if rng is not None:
        return int(rng.integers(low, high + 1))
    return min(max((length - side) // 2, low), high)
