"""What check_views measures, on subjects drawn in the views themselves."""

import numpy as np
from PIL import Image

from datamodules.mini import world
from datamodules.mini.render import render
from datamodules.mini.views import seen
from evaluation.metrics import build_encoders
from evaluation.protocols import MINI
from experiments.mini.recipe.check_views import TURNS, cut, likeness, summary
from experiments.mini.recipe.common import sample_world
from experiments.mini.recipe.views import caption, viewed


def test_the_turn_of_a_drawn_subject_is_found():
    picture = world.Picture(world.Identity("hat", "red", "blue", "banded", (0.5, 0.5, 0.5)), "snow")
    images, masks = render([picture, *(seen(picture, words) for words in TURNS if words != "upright")])
    upright, side, over = (cut(Image.fromarray(image), mask > 0) for image, mask in zip(images, masks, strict=True))
    dino = build_encoders({"dino": MINI.dino})["dino"]
    for turn, subject in enumerate((upright, side, over)):
        assert likeness(dino, subject, upright).argmax() == turn


def test_a_cut_subject_fills_the_picture_whatever_its_size():
    mask = np.zeros((64, 64), bool)
    mask[30:40, 10:15] = True
    found = np.asarray(cut(Image.new("RGB", (64, 64), "red"), mask)) < 128
    assert found[..., 1].any(1).sum() in (57, 58) and found[..., 1].any(0).sum() in (28, 29)


def test_summary_counts_the_turn_asked_for():
    cosines = np.asarray([[0.9, 0.1, 0.2], [0.3, 0.1, 0.8]], np.float32)
    assert summary("upside down", np.asarray([0.2, 0.4]), cosines) == {"pictures": 2, "share": 0.3, "turn_is_likeliest": 0.5, "dino": 0.5}
    assert summary("far away", np.asarray([0.2, 0.4]), cosines)["dino"] == 0.6


def test_two_thirds_of_the_pictures_to_learn_from_are_in_a_view_that_the_caption_says():
    pictures, rng = viewed(30), np.random.default_rng(0)
    assert sum(bool(picture.words) for picture in pictures) == 20
    assert all(picture.words in caption(picture, rng) for picture in pictures)
    assert pictures[0].identity == sample_world(40_000_000, 1)[0].identity
