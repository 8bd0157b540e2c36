"""Pictures as they come from the wild: of any mode, lying on their side, transparent."""

import numpy as np
from PIL import Image, ImageOps


def to_rgb(picture: Image.Image, turn: bool = True) -> Image.Image:
    """8-bit RGB, turned as its EXIF says (unless told not to); transparent parts become white, like the background of I_wb."""
    picture = scaled_to_bytes(picture)
    picture = ImageOps.exif_transpose(picture) if turn else picture
    picture = on_ground(picture, "white")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def to_grey(picture: Image.Image, turn: bool = True) -> Image.Image:
    """8-bit grey, as a mask is read; turned as its EXIF says (unless told not to). Transparent parts become black: some masks are in alpha alone."""
    picture = scaled_to_bytes(picture)
    picture = ImageOps.exif_transpose(picture) if turn else picture
    return on_ground(picture, "black").convert("L")


def is_black(picture: Image.Image) -> bool:
    """Whether every pixel is black, transparent or not."""
    return picture.convert("RGB").getbbox() is None


def is_coloured(picture: Image.Image) -> bool:
    """Whether more than one percent of what is not transparent is not grey."""
    picture = scaled_to_bytes(picture)
    chroma = np.asarray(on_ground(picture, "black").convert("RGB").convert("YCbCr"), np.int16)[..., 1:] - 128
    seen = np.count_nonzero(np.asarray(picture.convert("RGBA").getchannel("A"))) if picture.has_transparency_data else chroma[..., 0].size
    return bool(np.count_nonzero(np.abs(chroma).max(-1) > 6) > 0.01 * seen)


def on_ground(picture: Image.Image, color: str) -> Image.Image:
    """Transparent parts in this colour; other pictures as they are."""
    if not picture.has_transparency_data:
        return picture
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, color), layer)


def scaled_to_bytes(picture: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, where Pillow's own conversion clips at 255, and floating-point grey, which is in 0..1 or in 0..255; any other
    picture as it is, integers of mode "I" up to 255 too. Raises ValueError for floating point beyond.
    """
    if picture.mode == "F":
        return bytes_of_floats(picture)
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture)
    if picture.mode == "I" and values.max() <= 255:
        return picture
    grey = Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
    grey.info = dict(picture.info)
    if isinstance(key := grey.info.get("transparency"), int):
        grey.info["transparency"] = key // 257
    return grey


def bytes_of_floats(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 255 or 1 < values.max() < 2:
        raise ValueError("a floating-point picture has to be in 0..1 or in 0..255")
    grey = Image.fromarray((values * (255 if values.max() <= 1 else 1)).round().astype(np.uint8))
    grey.info = picture.info
    return grey
