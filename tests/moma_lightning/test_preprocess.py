import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from moma_lightning.models.preprocess import on_white_square, preprocess, preprocess_square

STATS = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}


def pictures(height, width):
    """Smooth colour with a hard-edged white background, uint8."""
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([255 * rows / height, 255 * columns / width, 60 + 0 * rows], -1)
    picture[(rows - height / 2) ** 2 + (columns - width / 2) ** 2 > (min(height, width) / 3) ** 2] = 255
    return np.stack([picture, picture[::-1]]).astype(np.uint8)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (90, 50), (31, 47), (200, 200)])
@pytest.mark.parametrize("options", [
    {"size": {"shortest_edge": 56}, "crop_size": 56},
    {"size": {"shortest_edge": 56}, "crop_size": 48},
    {"size": {"height": 40, "width": 40}, "do_center_crop": False},
    {"size": {"shortest_edge": 32}, "crop_size": 41},
    {"size": {"shortest_edge": 32}, "crop_size": 32, "resample": 2},
], ids=["square", "crop", "squash", "border", "bilinear"])
def test_equals_the_image_processor(size, options):
    processor = CLIPImageProcessor(**options, **STATS)
    images = pictures(*size)
    expected = processor(images=list(images), return_tensors="pt").pixel_values
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    difference = (preprocess(pixels, processor) - expected).abs()
    # The image processor rounds to 8 bits after resizing; one step is 1 / 255 / 0.26 = 0.015.
    assert difference.max() < 0.02
    assert difference.mean() < 0.008


@pytest.mark.parametrize("size", [(48, 80), (90, 50), (64, 64)])
@pytest.mark.parametrize("resample", [3, 1], ids=["bicubic", "lanczos"])
def test_the_whole_picture_on_a_white_square(size, resample):
    """Against the image processor on pictures that PIL pasted on white; it has only bicubic to compare with."""
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32, **STATS)
    squares = [Image.new("RGB", (max(size), max(size)), "white") for _ in range(2)]
    for square, image in zip(squares, pictures(*size), strict=True):
        square.paste(Image.fromarray(image), ((max(size) - size[1]) // 2, (max(size) - size[0]) // 2))
    expected = processor(images=squares, return_tensors="pt").pixel_values
    pixels = torch.from_numpy(pictures(*size)).permute(0, 3, 1, 2).float() / 127.5 - 1
    processor.resample = resample
    difference = (preprocess_square(pixels, 32, processor) - expected).abs()
    assert difference.max() < 0.02 and difference.mean() < 0.008
    assert on_white_square(pixels).shape == (2, 3, max(size), max(size))


def test_a_picture_of_the_right_size_is_only_normalised():
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16, **STATS)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = (torch.tensor(v)[:, None, None] for v in STATS.values())
    assert torch.equal(preprocess(pixels, processor), ((pixels + 1) / 2 - mean) / std)


def test_refuses_a_filter_it_does_not_have():
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8, resample=0)
    with pytest.raises(ValueError, match="filter 0"):
        preprocess(torch.zeros(1, 3, 16, 16), processor)
