"""Masks and labels as they are given, and what the guide makes of them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from moma_lightning import pipeline
from moma_lightning.models.attention import ContextConditioning, Recorder
from moma_lightning.pipeline import MoMAPipeline
from moma_lightning.subject import SubjectGuide, SubjectSettings, foreground, label_tokens, picture_pixels
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


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_reference_pass_sees_the_variants_picture_and_reads_the_label(base, monkeypatch, variant):
    pipe, given = MoMAPipeline.from_base(base, tiny_adapter(base, variant)), []
    features = pipe.adapter.reference_features
    monkeypatch.setattr(pipe.adapter, "reference_features", lambda unet, *inputs: given.extend(inputs) or features(unet, *inputs))
    pipe.prepare_subject(picture(), square_mask(), "cat", 64 * 64)
    pixels = torch.from_numpy(np.asarray(picture(), np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    shown = torch.where(square_mask()[None] > 0, pixels, 1.0) if variant == "paper" else pixels
    torch.testing.assert_close(given[0], base.vae.encode(shown).latent_dist.mean * base.vae.config.scaling_factor)
    ids = base.tokenizer("cat", padding="max_length", max_length=base.tokenizer.model_max_length, return_tensors="pt").input_ids
    torch.testing.assert_close(given[1], base.text_encoder(ids).last_hidden_state)


@pytest.mark.parametrize(("variant", "has_subject", "acts", "context_is_masked"), [
    ("paper", True, [1, 1, 1, 1], [0, 0, 0, 0]), ("released", True, [0, 0, 0, 1], [0, 1, 0, 1]),
    ("paper", False, [0, 0, 0, 0], [0, 0, 0, 0]), ("released", False, [0, 0, 0, 0], [0, 0, 0, 0])])
def test_when_the_subject_acts_and_what_m_gen_masks(base, variant, has_subject, acts, context_is_masked):
    """README, "Paper and released code". An IP-Adapter has neither."""
    adapter = tiny_adapter(base, variant)
    adapter.has_subject = has_subject
    subject = MoMAPipeline.from_base(base, adapter).prepare_subject(picture(), square_mask(), "cat", 64 * 64)
    guide = SubjectGuide(adapter, subject, torch.ones(1, 5), 1, False, (8, 8), SubjectSettings(1.0, 1.0, 0.2, None, False))
    found = []
    for t, mask in ((999, None), (950, torch.ones(1, 1, 8, 8)), (949, None), (949, torch.ones(1, 1, 8, 8))):
        guide.generated_mask, context = mask, ContextConditioning({})
        found.append((guide.conditioning(t, context, Recorder()).subject is not None, context.generated_mask is not None))
    assert found == [(bool(a), bool(b)) for a, b in zip(acts, context_is_masked, strict=True)]


def test_mask_strength_is_that_of_both_masks(base):
    """Table 3: 1 - s (1 - M) in the places of M_ref and M_gen."""
    adapter = tiny_adapter(base)
    subject = MoMAPipeline.from_base(base, adapter).prepare_subject(picture(), square_mask(), "cat", 64 * 64)
    guide = SubjectGuide(adapter, subject, torch.ones(1, 5), 1, False, (8, 8), SubjectSettings(1.0, 0.25, 0.2, None, False))
    guide.generated_mask = torch.rand(1, 1, 8, 8)
    acting = guide.conditioning(500, None, Recorder()).subject
    torch.testing.assert_close(acting.generated_mask.weight(64), 1 - 0.25 * (1 - guide.generated_mask.flatten(1)))
    torch.testing.assert_close(acting.keys[0].bias.exp().flatten(), 1 - 0.25 * (1 - square_mask()[0, ::8, ::8].flatten()))


@pytest.mark.parametrize("guide_subject", [False, True])
def test_pictures_of_a_prompt_have_its_label_and_beta(base, guide_subject):
    adapter, tokens = tiny_adapter(base), torch.eye(2)
    subject = MoMAPipeline.from_base(base, adapter).prepare_subject(picture(), square_mask(), "cat", 64 * 64)
    guide = SubjectGuide(adapter, subject, tokens, 2, True, (8, 8), SubjectSettings([0.5, 1.0], 1.0, 0.2, None, guide_subject))
    assert torch.equal(guide.label_tokens, tokens[[0, 0, 1, 1]])
    conditional = [0.5, 0.5, 1.0, 1.0]
    assert guide.beta.flatten().tolist() == ([0.0] * 4 if guide_subject else conditional) + conditional


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


def test_a_label_is_found_in_its_plural_too(base):
    one, two = label_tokens([base.tokenizer], ["a cat on a lake", "cats on a lake"], "cat")
    assert one.nonzero().flatten().tolist() == [2] and two[1]


def test_a_reference_is_resized_bicubic():
    shown = np.asarray(picture(90, 40).resize((96, 48), Image.Resampling.BICUBIC), np.float32)
    torch.testing.assert_close(picture_pixels(picture(90, 40), 64 * 64, 16)[0], torch.from_numpy(shown).permute(2, 0, 1) / 127.5 - 1)


def test_bytes_in_a_mask_are_grey_levels(base):
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    levels = (square_mask() * 255).to(torch.uint8)
    given = [pipe.prepare_subject(picture(), mask, "cat", 64 * 64).mask for mask in (square_mask(), levels, levels.clamp(min=100))]
    assert torch.equal(given[0], given[1]) and torch.equal(given[0], given[2])


@pytest.mark.parametrize("colour", [(200, 40, 40, 255), (125, 112, 98, 255)], ids=["red", "grey-brown"])
@pytest.mark.parametrize("ground", [(0, 0, 0, 0), (255, 255, 255, 255)], ids=["transparent", "white"])
def test_a_cut_out_is_no_mask(ground, colour):
    """Its brightness says nothing of where the subject is."""
    cut_out = Image.new("RGBA", (64, 64), ground)
    cut_out.paste(colour, (16, 16, 32, 32))
    with pytest.raises(ValueError, match="picture in colours: .* its alpha channel"):
        foreground(cut_out, (64, 64), (64, 64))
    if ground[3] == 0:
        assert torch.equal(foreground(cut_out.getchannel("A"), (64, 64), (64, 64)), square_mask()[None])


def test_a_small_cut_out_is_no_mask_either():
    """Half a percent of the picture; all of what is not transparent."""
    cut_out = Image.new("RGBA", (64, 64))
    cut_out.paste((200, 40, 40, 255), (16, 16, 20, 21))
    with pytest.raises(ValueError, match="picture in colours"):
        foreground(cut_out, (64, 64), (64, 64))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "JPEG"])
def test_a_mask_may_be_of_any_mode(mode):
    mask, file = Image.fromarray((square_mask()[0].numpy() * 255).astype(np.uint8)), io.BytesIO()
    if mode == "JPEG":  # of three channels
        mask.convert("RGB").save(file, mode, quality=30)
    assert torch.equal(foreground(Image.open(file) if mode == "JPEG" else mask.convert(mode), (64, 64), (64, 64)), square_mask()[None])


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
