"""The square that is cut from a picture and its mask, with the whole subject in it."""

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Box = tuple[int, int, int, int]

#: Without AVX, and so on ARM, its resizing takes twice as long as Pillow's.
TORCH_IS_FASTER = torch.backends.cpu.get_cpu_capability().startswith("AVX")


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


def cut(picture: Image.Image, box: Box, size: int) -> UInt8[Tensor, "channels size size"]:
    """Cut a box and resize it to size x size: pictures (RGB) bicubic with white beyond their edge, masks ("L") nearest with 0."""
    is_mask = picture.mode == "L"
    square = Image.new(picture.mode, (box[2] - box[0], box[3] - box[1]), 0 if is_mask else "white")
    square.paste(picture, (-box[0], -box[1]))
    return as_bytes(square.resize((size, size), Image.Resampling.NEAREST)) if is_mask else bicubic(square, size)


def as_bytes(picture: Image.Image) -> UInt8[Tensor, "channels height width"]:
    """Pixels of an RGB or grey picture, 0 to 255."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def bicubic(square: Image.Image, size: int) -> UInt8[Tensor, "3 size size"]:
    """By Pillow's antialiased filter; where PyTorch's is some four times as fast on bytes, by that, to within two levels of 255."""
    if square.width == size or not TORCH_IS_FASTER:
        return as_bytes(square.resize((size, size), Image.Resampling.BICUBIC))
    return F.interpolate(as_bytes(square).unsqueeze(0), (size, size), mode="bicubic", antialias=True).squeeze(0)


def _offset(length: int, side: int, start: int, stop: int, rng: np.random.Generator | None) -> int:
    if side >= length:
        return -((side - length) // 2)
    low, high = max(0, stop - side), min(start, length - side)
    if rng is not None:
        return int(rng.integers(low, high + 1))
    return min(max((length - side) // 2, low), high)
