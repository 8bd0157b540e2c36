"""Pictures and masks as they come from the wild: any mode, any orientation, any size, made into RGB and binary."""

import io
import struct
import zlib
from pathlib import Path

from PIL import Image

from moma_lightning.pictures import to_grey, to_rgb

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


def open_mask(source: bytes | Path, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode a mask to mode "L" holding only 0 and 255, cut at `MASK_THRESHOLD`, of its picture's `size`, if given. Raises one of `PICTURE_ERRORS`."""
    mask = to_grey(_decoded(source), turn=False)
    mask = mask if size is None else fit_mask(mask, size)
    return mask.point([0] * MASK_THRESHOLD + [255] * (256 - MASK_THRESHOLD))


def fit_mask(mask: Image.Image, size: tuple[int, int], tolerance: float = MASK_TOLERANCE) -> Image.Image:
    """Resize a mask to its picture's (width, height), nearest; ValueError when their proportions differ by `tolerance` or more."""
    if mask.size == size:
        return mask
    stretch = mask.width * size[1] / (mask.height * size[0])
    if not 1 - tolerance < stretch < 1 + tolerance:
        raise ValueError(f"a mask of {mask.width}x{mask.height} does not fit a picture of {size[0]}x{size[1]}")
    return mask.resize(size, Image.Resampling.NEAREST)


def _decoded(source: bytes | Path, at_least: int | None = None) -> Image.Image:
    picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if at_least is not None:
        picture.draft(None, (at_least, at_least))
    picture.load()
    return picture
