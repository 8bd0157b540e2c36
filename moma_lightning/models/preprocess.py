"""What a CLIP-style image processor does, on tensors that are already pictures in [-1, 1]."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

#: PIL's resampling filters, by number, as torch calls them.
INTERPOLATION = {2: "bilinear", 3: "bicubic"}
LANCZOS, BICUBIC = 1, 3


def preprocess(pixel_values: Float[Tensor, "batch 3 height width"], image_processor) -> Float[Tensor, "batch 3 size size"]:
    """Resize, crop and normalise as `image_processor` (a CLIPImageProcessor) says, without leaving the device.

    `pixel_values` are in [-1, 1], of any size. Raises ValueError when the processor asks for a filter that is not
    bilinear or bicubic.
    """
    pixels = (pixel_values.float() + 1) / 2
    if image_processor.do_resize:
        pixels = _resize(pixels, _target_size(pixels.shape[-2:], image_processor.size), int(image_processor.resample))
    if image_processor.do_center_crop:
        pixels = _center_crop(pixels, image_processor.crop_size["height"], image_processor.crop_size["width"])
    return _normalize(pixels, image_processor)


def preprocess_square(pixel_values: Float[Tensor, "batch 3 height width"], side: int, image_processor) -> Float[Tensor, "batch 3 side side"]:
    """The whole of each picture in [-1, 1] on a white square, resized to `side` and normalised as a multimodal LLM's `image_processor` says.

    Nothing is cut off, and nothing is split in tiles. Lanczos, SmolVLM's filter, becomes bicubic, as in its own processor on GPUs.
    Raises ValueError as `preprocess`.
    """
    pixels = (on_white_square(pixel_values.float()) + 1) / 2
    resample = int(image_processor.resample)
    return _normalize(_resize(pixels, (side, side), BICUBIC if resample == LANCZOS else resample), image_processor)


def on_white_square(white_background: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 longer longer"]:
    """Pictures in [-1, 1] with more white on both sides of the shorter axis."""
    height, width = white_background.shape[-2:]
    rows, columns = max(0, width - height), max(0, height - width)
    return F.pad(white_background, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), value=1.0)


def _normalize(pixels: Tensor, image_processor) -> Tensor:
    if not image_processor.do_normalize:
        return pixels
    mean, std = (pixels.new_tensor(v)[:, None, None] for v in (image_processor.image_mean, image_processor.image_std))
    return (pixels - mean) / std


def _target_size(current: torch.Size, size) -> tuple[int, int]:
    """Height and width after resizing: a given pair, or the short side brought to `shortest_edge`."""
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    height, width = current
    short, long = size["shortest_edge"], int(size["shortest_edge"] * max(height, width) / min(height, width))
    return (short, long) if height <= width else (long, short)


def _resize(pixels: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    if resample not in INTERPOLATION:
        raise ValueError(f"the image processor's resample filter {resample} is not one of {INTERPOLATION} (PIL's numbers)")
    if pixels.shape[-2:] == torch.Size(size):
        return pixels
    # Bicubic overshoots at hard edges, of which a white background has many; 8-bit resizing clips that after each of its two
    # passes (columns, then rows), and so must this: in one pass it is off by up to 13 of 255 there.
    for shape in ((pixels.shape[-2], size[1]), size):
        pixels = F.interpolate(pixels, shape, mode=INTERPOLATION[resample], antialias=True, align_corners=False).clamp(0, 1)
    return pixels


def _center_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """The middle `height` x `width`; pictures smaller than that get a black border, as in the image processor."""
    missing = max(0, height - pixels.shape[-2]), max(0, width - pixels.shape[-1])
    if any(missing):
        top, left = (m // 2 for m in missing)
        pixels = F.pad(pixels, (left, missing[1] - left, top, missing[0] - top))
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]
