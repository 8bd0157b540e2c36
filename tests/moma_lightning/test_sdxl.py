"""MoMA on an SDXL base against StableDiffusionXLPipeline with the same weights, and what every pass of its UNet is told."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

from moma_lightning.families import family_of, index_of
from moma_lightning.models.attention import Conditioning, Recorder
from moma_lightning.models.latents import scaled, unscaled
from moma_lightning.models.mask_estimation import estimate_mask
from moma_lightning.pipeline import MoMAPipeline
from moma_lightning.subject import label_tokens
from tests.moma_lightning.test_pipeline import PROMPTS, generators, picture, run, square_mask
from tests.tiny import EMBED_DIM, POOLED_DIM, TEXT_DIM, TEXT_DIM_2, tiny_adapter, tiny_base, tiny_sdxl_base

SUBJECT = dict(image=picture(), mask=square_mask(), label="cat")


def stock(force_zeros: bool = True) -> StableDiffusionXLPipeline:
    """diffusers' own pipeline and attention on the same weights."""
    base = tiny_sdxl_base(force_zeros_for_empty_prompt=force_zeros)
    base.unet.set_attn_processor(AttnProcessor2_0())
    pipe = StableDiffusionXLPipeline(base.vae, base.text_encoder, base.text_encoder_2, base.tokenizer, base.tokenizer_2, base.unet, base.scheduler,
                                     force_zeros_for_empty_prompt=force_zeros, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_pictures(pipe: StableDiffusionXLPipeline, **options) -> np.ndarray:
    return pipe(PROMPTS, **(dict(guidance_scale=3.0, num_inference_steps=3, generator=generators(2), output_type="np") | options)).images


@pytest.fixture(scope="module")
def base():
    return tiny_sdxl_base()


@pytest.fixture(scope="module")
def plain(base):
    return stock_pictures(stock())


@pytest.mark.parametrize("force_zeros", [True, False])
@pytest.mark.parametrize("negative", [None, "a dog on a lake"])
def test_without_a_picture_it_is_sdxl_bit_for_bit(force_zeros, negative):
    pipe = MoMAPipeline.from_base(tiny_sdxl_base(force_zeros_for_empty_prompt=force_zeros))
    assert isinstance(pipe, StableDiffusionXLPipeline)
    ours = run(pipe, image_embeds=None, negative_prompt=negative, height=48, width=80).images
    assert np.array_equal(ours, stock_pictures(stock(force_zeros), negative_prompt=negative and [negative] * 2, height=48, width=80))


STATISTICS = dict(latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[0.7, 1.4, 2.0, 0.9])


def test_a_vae_with_mean_and_spread_of_its_latents_draws_as_sdxl_does(plain):
    """As of playground-v2.5: bit for bit stock's picture, which is another than without them."""
    theirs, ours = stock(), tiny_sdxl_base()
    for vae in (theirs.vae, ours.vae):
        vae.register_to_config(**STATISTICS)
    expected = stock_pictures(theirs)
    assert np.array_equal(run(MoMAPipeline.from_base(ours), image_embeds=None).images, expected)
    assert not np.array_equal(expected, plain)


def test_latents_go_to_the_unets_scale_and_back():
    vae, latents = tiny_sdxl_base().vae, torch.randn(2, 4, 3, 5)
    assert torch.equal(scaled(vae, latents), latents * vae.config.scaling_factor)
    assert torch.equal(unscaled(vae, latents), latents / vae.config.scaling_factor)
    vae.register_to_config(**STATISTICS)
    mean, std = (torch.tensor(STATISTICS[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(scaled(vae, latents), (latents - mean) / std * vae.config.scaling_factor)
    torch.testing.assert_close(unscaled(vae, scaled(vae, latents)), latents)
    with pytest.raises(ValueError, match="4 latents_mean and 4 latents_std for 3 channels"):
        scaled(vae, latents[:, :3])


def test_what_no_text_is_makes_another_picture(plain):
    assert not np.array_equal(plain, stock_pictures(stock(force_zeros=False)))


def test_lambda_zero_and_context_off_is_sdxl_bit_for_bit(base, plain, monkeypatch):
    """To rounding where the label's map is read off the text's matrix."""
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base, lambda_=0.0))
    np.testing.assert_allclose(run(pipe, **SUBJECT, context_scale=0.0).images, plain, atol=1e-5)
    monkeypatch.setenv("MOMA_KERNELS", "0")
    assert np.array_equal(run(pipe, **SUBJECT, context_scale=0.0).images, plain)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_beta_and_context_each_change_the_picture(base, plain, variant, monkeypatch):
    monkeypatch.setenv("MOMA_KERNELS", "0")
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base, variant))
    drawn = [run(pipe, **SUBJECT, beta=beta, context_scale=scale).images for beta, scale in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert np.array_equal(drawn[0], plain)
    assert all(not np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i]) and all(np.isfinite(d).all() for d in drawn)


def test_pictures_masks_and_references_of_any_shape(base):
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    output = run(pipe, image=picture(96, 64), mask=square_mask(96, 64), label="cat", height=72, width=104, num_images_per_prompt=2, return_masks=True)
    assert output.images.shape == (4, 72, 104, 3) and output.masks.shape == (3, 4, 1, 9, 13)
    assert np.isfinite(output.images).all() and output.masks.amin() == 0 and output.masks.amax() == 1


def test_every_pass_is_told_the_size_of_its_picture(base):
    """The reference's own in its pass at t = 0, the new picture's in both halves of every step; the pooled text beside it."""
    pipe, told = MoMAPipeline.from_base(base, tiny_adapter(base)), []
    hook = base.unet.register_forward_pre_hook(lambda _, args, kwargs: told.append((int(args[1]), kwargs["added_cond_kwargs"])), with_kwargs=True)
    run(pipe, image=picture(96, 64), mask=square_mask(96, 64), label="cat", height=48, width=80)
    hook.remove()
    assert [t for t, _ in told] == [0, 667, 334, 1]
    area = (48 * 80 / (96 * 64)) ** 0.5
    height, width = (max(1, round(side * area / 32)) * 32 for side in (64, 96))
    assert told[0][1]["time_ids"].tolist() == [[height, width, 0, 0, height, width]] and told[0][1]["text_embeds"].shape == (1, POOLED_DIM)
    for _, given in told[1:]:
        assert given["time_ids"].tolist() == [[48, 80, 0, 0, 48, 80]] * 4
        assert not given["text_embeds"][:2].any() and given["text_embeds"][2:].any(1).all()


def test_the_reference_pass_writes_down_every_self_attention_layer(base):
    """Per transformer: a block for each of its layers; levels of 2 and 3 in one of the down path, two of the up path, 3 in the middle."""
    adapter = tiny_adapter(base)
    text = base.encode_text(["cat"], (64, 96), torch.device("cpu"))
    found = adapter.reference_features(base.unet, torch.randn(1, 4, 8, 12), *text)
    assert sorted(found) == list(range(0, 2 * (2 + 3 + 2 * 3 + 2 * 2 + 3), 2)) == sorted(map(int, adapter.subject))
    assert Counter(tuple(key.shape[1:]) for key, _ in found.values()) == {(4 * 6, 16): 2 + 2 * 2, (2 * 3, 32): 3 + 2 * 3 + 3}


def test_the_labels_maps_come_from_every_cross_attention_layer(base):
    text = base.encode_text(PROMPTS, (72, 104), torch.device("cpu"))
    recorder = Recorder(label_tokens=label_tokens([base.tokenizer, base.tokenizer_2], PROMPTS, "cat"))
    base.unet(torch.randn(2, 4, 9, 13), 500, **text._asdict(), cross_attention_kwargs={"conditioning": Conditioning(recorder=recorder)})
    assert sorted(recorder.label_maps) == list(range(1, 36, 2))
    assert {m.shape for m in recorder.label_maps.values()} == {(2, 5 * 7), (2, 3 * 4)}
    assert estimate_mask(recorder.label_maps, (9, 13)).shape == (2, 1, 9, 13)


def test_tokenizers_that_place_the_label_differently_are_refused(base):
    shifted = lambda texts, **options: base.tokenizer_2([f"a {t}" if t in PROMPTS else t for t in texts] if isinstance(texts, list) else texts, **options)  # noqa: E731
    shifted.model_max_length = base.tokenizer_2.model_max_length
    with pytest.raises(ValueError, match="two tokenizers put 'cat' at different tokens"):
        label_tokens([base.tokenizer, shifted], PROMPTS, "cat")


@pytest.mark.parametrize("make", [tiny_base, tiny_sdxl_base])
def test_training_reads_a_text_as_sampling_does(make):
    base = make()
    trained = base.encode_text(PROMPTS, (64, 96), torch.device("cpu"))
    sampled = MoMAPipeline.from_base(base).encode_text(PROMPTS, (64, 96))
    assert torch.equal(trained.encoder_hidden_states, sampled.encoder_hidden_states)
    assert (trained.added_cond_kwargs is None) == (make is tiny_base)
    for name, value in (trained.added_cond_kwargs or {}).items():
        assert torch.equal(value, sampled.added_cond_kwargs[name])


def test_texts_are_read_with_encoders_whose_class_was_changed():
    """As FSDP does; transformers then returns no hidden states."""
    base, plain = tiny_sdxl_base(), MoMAPipeline.from_base(tiny_sdxl_base()).encode_text(PROMPTS, (64, 96), guided=True)
    for encoder in base.text_encoders:
        encoder.__class__ = type("Wrapped", (type(encoder),), {})
    again = MoMAPipeline.from_base(base).encode_text(PROMPTS, (64, 96), guided=True)
    assert torch.equal(again.encoder_hidden_states, plain.encoder_hidden_states)
    assert torch.equal(again.added_cond_kwargs["text_embeds"], plain.added_cond_kwargs["text_embeds"])


@pytest.mark.parametrize("force_zeros", [True, False])
def test_a_dropped_caption_is_what_the_unconditional_half_reads(force_zeros):
    base = tiny_sdxl_base(force_zeros_for_empty_prompt=force_zeros)
    dropped = base.encode_text([PROMPTS[0], ""], (64, 64), torch.device("cpu"))
    unconditional = MoMAPipeline.from_base(base).encode_text(PROMPTS[:1], (64, 64), guided=True)
    assert dropped.encoder_hidden_states.shape == (2, 24, TEXT_DIM + TEXT_DIM_2)
    torch.testing.assert_close(dropped.encoder_hidden_states.flip(0), unconditional.encoder_hidden_states)
    torch.testing.assert_close(dropped.added_cond_kwargs["text_embeds"].flip(0), unconditional.added_cond_kwargs["text_embeds"])
    assert dropped.encoder_hidden_states[1].any() != force_zeros


@pytest.mark.parametrize("force_upcast, dtype", [(True, torch.float32), (False, torch.float16)])
def test_an_autoencoder_that_overflows_in_half_precision_works_in_single(base, force_upcast, dtype):
    pipe = MoMAPipeline.from_base(replace(base, vae=tiny_sdxl_base().vae.to(torch.float16)))
    pipe.vae.register_to_config(force_upcast=force_upcast)
    with pipe.vae_in_range():
        assert pipe.vae.dtype == dtype
    assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("parts", [{"text_encoder": [None, None], "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
                                   {"text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_3": ["transformers", "T5EncoderModel"]}])
def test_a_refiner_and_other_families_are_refused(tmp_path, parts):
    index = {"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]} | parts
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is neither Stable Diffusion nor SDXL: its model_index.json lists"):
        family_of(str(tmp_path), index_of(str(tmp_path)))


def test_the_context_side_in_stock_sdxl_draws_the_same_picture(base, tmp_path, monkeypatch):
    """`load_ip_adapter` on our file, in IP-Adapter's SDXL layout, against ours with beta 0 and masking off: bit for bit."""
    monkeypatch.setenv("MOMA_KERNELS", "0")
    from moma_lightning.__main__ import main
    from moma_lightning.checkpoints import save_adapter

    adapter = tiny_adapter(base)
    save_adapter(adapter, tmp_path / "ours")
    assert main(["convert", "--from", str(tmp_path / "ours"), "--to", str(tmp_path / "ip.safetensors")]) == 0
    embeds = torch.randn(1, EMBED_DIM, generator=torch.Generator().manual_seed(5))
    pipe = stock()
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="ip.safetensors", image_encoder_folder=None)
    expected = stock_pictures(pipe, ip_adapter_image_embeds=[torch.stack([torch.zeros_like(embeds), embeds])])
    ours = MoMAPipeline.from_base(base, adapter)
    assert np.array_equal(run(ours, image_embeds=embeds).images, expected)
    assert np.array_equal(run(ours, **SUBJECT, image_embeds=embeds, beta=0.0, mask_strength=0.0).images, expected)
    assert not np.array_equal(run(ours, image_embeds=embeds, context_scale=0.5).images, expected)
