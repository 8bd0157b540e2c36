import numpy as np
import pytest
from PIL import Image

from datamodules import pictures

EXIF_ORIENTATION = 0x0112


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "I;16"])
def test_any_mode_becomes_rgb_of_the_same_grey(tools, mode):
    grey = Image.new("L", (5, 4), 255 if mode == "1" else 120)
    if mode == "I;16":
        file = tools.encode(Image.fromarray(np.full((4, 5), 120 * 257, np.uint16)))
    else:
        converted = grey.convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
        file = tools.encode(converted, "TIFF" if mode == "CMYK" else "PNG")
    image = pictures.open_picture(file)
    assert image.mode == "RGB" and image.size == (5, 4)
    assert np.abs(np.asarray(image).astype(int) - grey.getpixel((0, 0))).max() <= 4


def test_cmyk_jpeg(tools):
    file = tools.encode(Image.new("RGB", (8, 8), (250, 10, 10)).convert("CMYK"), "JPEG")
    assert np.allclose(np.asarray(pictures.open_picture(file))[4, 4], (250, 10, 10), atol=12)


def test_transparent_is_white(tools):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(pictures.open_picture(tools.encode(clear))).min() == 255


def test_exif_turns_the_picture(tools):
    image = Image.new("RGB", (8, 4), "blue")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # shown after a quarter turn clockwise
    assert pictures.open_picture(tools.encode(image, "JPEG", exif=exif)).size == (4, 8)


@pytest.mark.parametrize("at_least, size", [(200, (400, 300)), (150, (200, 150)), (151, (400, 300)), (10, (50, 38)), (500, (400, 300))])
def test_a_jpeg_may_come_smaller_but_not_too_small(tools, at_least, size):
    image = Image.new("RGB", (400, 300), "blue")
    assert pictures.open_picture(tools.encode(image, "JPEG"), at_least=at_least).size == size
    assert pictures.open_picture(tools.encode(image, "PNG"), at_least=at_least).size == (400, 300)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not a picture", lambda b: b""])
def test_damaged_picture_raises_a_known_error(tools, damage):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    for kind in ("JPEG", "PNG"):
        with pytest.raises(pictures.PICTURE_ERRORS):
            pictures.open_picture(damage(tools.encode(noise, kind)))


def test_mask_threshold_leaves_noise_out(tools):
    values = np.asarray([[0, 3, 127, 128, 250, 255]], np.uint8)
    assert np.asarray(pictures.open_mask(tools.encode(Image.fromarray(values)))).tolist() == [[0, 0, 0, 255, 255, 255]]


def test_mask_of_16_bits(tools):
    values = np.asarray([[0, 65535, 30000, 40000]], np.uint16)
    assert np.asarray(pictures.open_mask(tools.encode(Image.fromarray(values)))).tolist() == [[0, 255, 0, 255]]


def test_mask_of_another_size_is_fitted_and_of_another_shape_refused(tools):
    half = Image.new("L", (10, 5), 0)
    half.paste(255, (0, 0, 5, 5))
    fitted = np.asarray(pictures.fit_mask(half, (40, 20)))
    assert fitted[:, :20].min() == 255 and fitted[:, 20:].max() == 0
    assert np.array_equal(pictures.open_mask(tools.encode(half), (40, 20)), fitted)
    with pytest.raises(ValueError, match="mask of 10x5 does not fit a picture of 20x40"):
        pictures.open_mask(tools.encode(half), (20, 40))
