import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import pictures, squares
from datamodules.squares import as_bytes, cut, square_box


def test_square_keeps_the_subject_wherever_it_is(tools):
    for _ in range(300):
        width, height = (int(v) for v in tools.rng.integers(5, 60, 2))
        x, y = (sorted(int(v) for v in tools.rng.integers(0, length + 1, 2)) for length in (width, height))
        if x[0] == x[1] or y[0] == y[1]:
            continue
        for rng in (None, tools.rng):
            left, top, right, bottom = square_box((width, height), (x[0], y[0], x[1], y[1]), rng)
            assert right - left == bottom - top >= min(width, height)
            assert left <= x[0] and top <= y[0] and right >= x[1] and bottom >= y[1]
            if x[1] - x[0] <= min(width, height) >= y[1] - y[0]:
                assert left >= 0 and top >= 0 and right <= width and bottom <= height


def test_square_is_random_in_training_and_central_in_validation(tools):
    subject = (40, 2, 60, 18)
    assert square_box((100, 20), subject) == (40, 0, 60, 20)
    assert square_box((100, 20), (48, 2, 52, 18)) == (40, 0, 60, 20)
    places = {square_box((100, 20), (48, 2, 52, 18), tools.rng)[0] for _ in range(400)}
    assert places == set(range(32, 49))


def test_long_subject_is_padded_with_white_and_no_mask():
    picture, mask = Image.new("RGB", (40, 10), "red"), Image.new("L", (40, 10), 255)
    box = square_box(picture.size, mask.getbbox(), np.random.default_rng(0))
    assert box == (0, -15, 40, 25)
    values = cut(picture, box, 40)
    assert values[:, 20].T.tolist() == [[255, 0, 0]] * 40 and values[:, 5].min() == 255 and values[:, 35].min() == 255
    assert cut(mask, box, 40).sum() == 255 * 400


@pytest.mark.parametrize("side, size, levels", [(384, 256, 1), (97, 64, 1), (40, 64, 1), (255, 256, 1), (3, 256, 2), (300, 31, 1), (1, 8, 1), (64, 1, 1)])
@pytest.mark.parametrize("torch_is_faster", [True, False])
def test_resizing_is_pillows_to_two_levels(tools, monkeypatch, side, size, levels, torch_is_faster):
    monkeypatch.setattr(squares, "TORCH_IS_FASTER", torch_is_faster)
    square = Image.fromarray(tools.rng.integers(0, 256, (side, side, 3), np.uint8))
    ours, pillows = squares.bicubic(square, size).int(), as_bytes(square.resize((size, size), Image.Resampling.BICUBIC)).int()
    assert ours.shape == (3, size, size) and (ours - pillows).abs().max() <= levels * torch_is_faster
    assert (ours != pillows).float().mean() < 0.02


def test_a_square_of_the_right_size_is_left_as_it_is(tools):
    square = Image.fromarray(tools.rng.integers(0, 256, (32, 32, 3), np.uint8))
    assert torch.equal(cut(square, (0, 0, 32, 32), 32), as_bytes(square))


def test_reduced_decoding_cannot_be_seen(tools):
    """A picture of soft shapes, decoded whole and resized by Pillow, and as in training: over 40 dB between the two."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize((1024, 768), Image.Resampling.BICUBIC)
    content, side = tools.encode(image, "JPEG", quality=92), 256
    full, reduced = (pictures.open_picture(content, at_least=least) for least in (None, side))
    assert reduced.size == (512, 384)
    ours = cut(reduced, square_box(reduced.size, (0, 0, 1, 1)), side).double()
    pillows = as_bytes(full.crop(square_box(full.size, (0, 0, 1, 1))).resize((side, side), Image.Resampling.BICUBIC)).double()
    assert 10 * torch.log10(255**2 / (ours - pillows).square().mean()) > 40
