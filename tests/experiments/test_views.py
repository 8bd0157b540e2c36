"""What check_views measures, on subjects drawn in the views themselves."""

import numpy as np
from PIL import Image

from datamodules.mini import world
from datamodules.mini.render import render
from datamodules.mini.views import seen
from experiments.mini.recipe.check_views import TURNS, cut, fit_of_turns, summary
from experiments.mini.recipe.common import sample_world
from experiments.mini.recipe.views import caption, viewed


def test_the_turn_of_a_drawn_subject_is_found():
    """Of two pictures of a subject, the second one in each turn."""
    right = []
    for index in range(24):
        subject, rng = world.identity("train", 5_000_000 + index), np.random.default_rng(index)
        first, second = (world.sample_picture(rng, subject) for _ in range(2))
        masks = render([first, second, *(seen(second, words) for words in TURNS if words != "upright")])[1] > 0
        right += [fit_of_turns(mask, masks[0]).argmax() == turn for turn, mask in enumerate(masks[1:])]
    assert np.mean(right) > 0.8


def test_a_cut_subject_fills_the_picture_whatever_its_size():
    mask = np.zeros((64, 64), bool)
    mask[30:40, 10:15] = True
    found = np.asarray(cut(Image.new("RGB", (64, 64), "red"), mask)) < 128
    assert found[..., 1].any(1).sum() in (57, 58) and found[..., 1].any(0).sum() in (28, 29)


def test_summary_counts_the_turn_asked_for():
    fits = np.asarray([[0.9, 0.1, 0.2], [0.3, 0.1, 0.8]], np.float32)
    assert summary("upside down", np.asarray([0.2, 0.4]), fits) == {"pictures": 2, "share": 0.3, "turn_fits_best": 0.5, "iou": 0.5}
    assert summary("far away", np.asarray([0.2, 0.4]), fits)["iou"] == 0.6


def test_two_thirds_of_the_pictures_to_learn_from_are_in_a_view_that_the_caption_says():
    pictures, rng = viewed(30), np.random.default_rng(0)
    assert sum(bool(picture.words) for picture in pictures) == 20
    assert all(picture.words in caption(picture, rng) for picture in pictures)
    assert pictures[0].identity == sample_world(40_000_000, 1)[0].identity
