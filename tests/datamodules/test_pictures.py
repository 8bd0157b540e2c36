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


def test_reduced_decoding_cannot_be_seen(tools):
    """A picture of soft shapes, cut and resized as in training: over 40 dB between the two ways."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize((1024, 768), Image.Resampling.BICUBIC)
    content, side = tools.encode(image, "JPEG", quality=92), 256
    full, reduced = (pictures.open_picture(content, at_least=least) for least in (None, side))
    assert reduced.size == (512, 384)
    a, b = (np.asarray(pictures.cut(p, pictures.square_box(p.size, (0, 0, 1, 1)), side), float) for p in (full, reduced))
    assert 10 * np.log10(255**2 / ((a - b) ** 2).mean()) > 40


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


def test_mask_of_another_size_is_fitted_and_of_another_shape_refused():
    half = Image.new("L", (10, 5), 0)
    half.paste(255, (0, 0, 5, 5))
    fitted = np.asarray(pictures.fit_mask(half, (40, 20)))
    assert fitted[:, :20].min() == 255 and fitted[:, 20:].max() == 0
    with pytest.raises(ValueError, match="mask of 10x5 does not fit a picture of 20x40"):
        pictures.fit_mask(half, (20, 40))


def test_square_keeps_the_subject_wherever_it_is(tools):
    for _ in range(300):
        width, height = (int(v) for v in tools.rng.integers(5, 60, 2))
        x, y = (sorted(int(v) for v in tools.rng.integers(0, length + 1, 2)) for length in (width, height))
        if x[0] == x[1] or y[0] == y[1]:
            continue
        for rng in (None, tools.rng):
            left, top, right, bottom = pictures.square_box((width, height), (x[0], y[0], x[1], y[1]), rng)
            assert right - left == bottom - top >= min(width, height)
            assert left <= x[0] and top <= y[0] and right >= x[1] and bottom >= y[1]
            if x[1] - x[0] <= min(width, height) >= y[1] - y[0]:
                assert left >= 0 and top >= 0 and right <= width and bottom <= height


def test_square_is_random_in_training_and_central_in_validation(tools):
    subject = (40, 2, 60, 18)
    assert pictures.square_box((100, 20), subject) == (40, 0, 60, 20)
    assert pictures.square_box((100, 20), (48, 2, 52, 18)) == (40, 0, 60, 20)
    places = {pictures.square_box((100, 20), (48, 2, 52, 18), tools.rng)[0] for _ in range(400)}
    assert places == set(range(32, 49))


def test_long_subject_is_padded_with_white_and_no_mask():
    picture, mask = Image.new("RGB", (40, 10), "red"), Image.new("L", (40, 10), 255)
    box = pictures.square_box(picture.size, mask.getbbox(), np.random.default_rng(0))
    assert box == (0, -15, 40, 25)
    values = np.asarray(pictures.cut(picture, box, 40))
    assert values[20].tolist() == [[255, 0, 0]] * 40 and values[5].min() == 255 and values[35].min() == 255
    assert np.asarray(pictures.cut(mask, box, 40)).sum() == 255 * 400
