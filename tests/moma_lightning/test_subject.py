"""Masks and labels as they are given, and what the guide makes of them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from moma_lightning import pipeline
from moma_lightning.pipeline import MoMAPipeline
from tests.moma_lightning.test_pipeline import generators, picture, run, square_mask
from tests.tiny import tiny_adapter, tiny_base


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def test_jpeg_noise_in_a_mask_is_background(base):
    """Grey 10 of 255 in a mask's background must not count as subject, as it does in the released code."""
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    clean = Image.fromarray((square_mask()[0].numpy() * 255).astype(np.uint8))
    noisy = Image.fromarray(np.maximum(np.asarray(clean), 10))
    pictures = [run(pipe, image=picture(), mask=m, label="cat").images for m in (clean, noisy)]
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("size", [1, 4])
def test_a_subject_smaller_than_any_attention_cell_still_acts(base, size):
    """In the released code it can vanish from the coarsest mask, and the softmax over nothing is not a number."""
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    mask = torch.zeros(1, 64, 64)
    mask[:, 33 : 33 + size, 18 : 18 + size] = 1
    with_subject, without = (run(pipe, image=picture(), mask=mask, label="cat", beta=beta).images for beta in (1.0, 0.0))
    assert np.isfinite(with_subject).all() and not np.array_equal(with_subject, without)


def test_the_labels_place_is_that_behind_a_textual_inversion_of_several_vectors(monkeypatch):
    base = tiny_base()
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    width = base.text_encoder.config.hidden_size
    pipe.load_textual_inversion(torch.randn(3, width), token="<toy>")
    found = []
    guide = pipeline.SubjectGuide
    monkeypatch.setattr(pipeline, "SubjectGuide", lambda adapter, subject, tokens, *rest: found.append(tokens) or guide(adapter, subject, tokens, *rest))
    subject = dict(image=picture(), mask=square_mask(), label="cat", generator=generators(1))
    run(pipe, ["<toy> cat"], **subject)
    run(pipe, ["cat"], **subject)
    assert [int(tokens[0].argmax()) for tokens in found] == [4, 1]


def test_bytes_in_a_mask_are_grey_levels(base):
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    levels = (square_mask() * 255).to(torch.uint8)
    given = [pipe.prepare_subject(picture(), mask, "cat", 64 * 64).mask for mask in (square_mask(), levels, levels.clamp(min=100))]
    assert torch.equal(given[0], given[1]) and torch.equal(given[0], given[2])


def test_a_mask_of_other_proportions_is_refused_and_exif_turns_masks_too(base):
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    file = io.BytesIO()
    picture(96, 48).save(file, "JPEG", exif=exif)
    portrait = Image.open(file)  # shown at 48 x 96
    with pytest.raises(ValueError, match="a mask of 96x48 does not fit a picture that is shown at 48x96"):
        pipe.prepare_subject(portrait, torch.ones(48, 96), "cat", 64 * 64)
    lying = Image.new("L", (96, 48), 0)
    lying.paste(255, (0, 0, 48, 48))
    lying.getexif()[0x0112] = 6
    stored = io.BytesIO()
    lying.save(stored, "PNG", exif=exif)
    turned = pipe.prepare_subject(portrait, Image.open(stored), "cat", 64 * 64).mask[0, 0]
    upper, lower = turned.chunk(2)
    assert upper.mean() > 0.9 and lower.mean() < 0.1
