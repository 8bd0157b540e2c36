"""Pictures of any mode as the sampler reads them; tests/datamodules/test_pictures.py has them as files."""

import numpy as np
import pytest
from PIL import Image

from moma_lightning.pictures import to_grey, to_rgb


@pytest.mark.parametrize("array, seen", [
    (np.array([[0, 120 * 257, 65535]], np.uint16), [0, 120, 255]),  # 16 bits
    (np.array([[0, 120 * 257, 65535]], np.int32), [0, 120, 255]),  # 16 bits, as Pillow has opened them before its version 11
    (np.array([[0, 120, 255]], np.int32), [0, 120, 255]),  # 8 bits in integers
    (np.array([[0, 120, 255]], np.uint8), [0, 120, 255]),
    (np.array([[0, 120 / 255, 1]], np.float32), [0, 120, 255]),
    (np.array([[0, 120, 255]], np.float32), [0, 120, 255]),
])
def test_grey_of_any_depth(array, seen):
    assert np.asarray(to_grey(Image.fromarray(array))).tolist() == [seen]
    assert np.asarray(to_rgb(Image.fromarray(array)))[0, :, 1].tolist() == seen


def test_what_is_rgb_is_not_copied_unless_it_is_turned():
    plain = Image.new("RGB", (2, 3))
    assert to_rgb(plain, turn=False) is plain
    plain.getexif()[0x0112] = 6
    assert to_rgb(plain).size == (3, 2) and to_rgb(plain, turn=False).size == (2, 3)


def test_transparent_is_white_whatever_is_below():
    assert to_rgb(Image.new("RGBA", (1, 1), (9, 9, 9, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("values", [[0.0, float("nan")], [-1.0, 1.0], [0.0, 65535.0], [0.0, 1.003]])
def test_floats_of_an_unknown_range_are_refused(values):
    with pytest.raises(ValueError, match=r"0..1 or in 0..255"):
        to_grey(Image.fromarray(np.array([values], np.float32)))


def test_a_mask_may_be_in_alpha_alone():
    layer = Image.new("RGBA", (2, 1), "white")
    layer.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
    assert np.asarray(to_grey(layer)).tolist() == [[0, 255]]
    assert to_grey(Image.new("RGBA", (1, 1), "white")).getpixel((0, 0)) == 255, "opaque white is subject as before"
    layer.getexif()[0x0112] = 6
    assert to_grey(layer).size == (1, 2) and to_grey(layer, turn=False).size == (2, 1)
