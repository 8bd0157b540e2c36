"""A step of stage 2 by hand, as section 3 has it: what each part sees, the noise, the target, what is dropped, what a cache keeps."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moma_lightning.batch import CachedBatch, TripletBatch
from moma_lightning.models.attention import Conditioning
from moma_lightning.models.kept_reference import kept_reference
from moma_lightning.models.masks import MaskPyramid
from moma_lightning.models.text import token_ids
from moma_lightning.modules.stage2 import Stage2
from tests.moma_lightning.test_stage2 import EMBED, batch, loader, trainer


def drawn(module: Stage2, one: TripletBatch, seed: int) -> SimpleNamespace:
    """A step's inputs by hand, from the same random numbers in the same order."""
    generator, white = torch.Generator().manual_seed(seed), torch.where(one.subject_mask > 0.5, one.pixel_values, 1.0)
    shown = white if module.config.variant == "paper" else one.pixel_values
    latents, seen = (module.vae.encode(x).latent_dist.sample(generator) * module.vae.config.scaling_factor for x in (one.pixel_values, shown))
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(0, 1000, (len(one),), generator=generator)
    signal = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[timesteps].sqrt().view(-1, 1, 1, 1)
    return SimpleNamespace(white=white, latents=latents, seen=seen, noise=noise, timesteps=timesteps, signal=signal, rest=(1 - signal**2).sqrt())


@pytest.mark.parametrize("context", ["decoder", "image_encoder"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_step_is_section_3_by_hand(build_stage2, variant, context):
    """The reference pass reads the label and the noisy one the caption, the MLLM sees the subject on white, CLIP the whole picture, M_gen is M_ref."""
    module, one = build_stage2(variant=variant, context=context), batch(0)
    one = replace(one, caption=["a cat on a lake", "a mug at night", "a cat"], full_caption=["a red cat"] * 3, label=["cat", "mug", "cat"])
    adapter, by_hand, mask = module.adapter, drawn(module, one, 7), MaskPyramid(one.subject_mask, (4, 4))
    with torch.no_grad():
        for layer in adapter.subject.values():
            layer.lambda_.fill_(2.0)

    def read(words):
        return module.text_encoder(token_ids(module.base.tokenizer, words)).last_hidden_state

    given = adapter.context_conditioning(
        module.decoder(by_hand.white, one.label, one.caption) if context == "decoder" else module.image_encoder(one.pixel_values))
    given.generated_mask = mask if variant == "released" else None
    subject = adapter.subject_conditioning(adapter.reference_features(module.unet, by_hand.seen, read(one.label)), mask, mask)
    noisy = by_hand.signal * by_hand.latents + by_hand.rest * by_hand.noise
    predicted = module.unet(noisy, by_hand.timesteps, read(one.caption), cross_attention_kwargs={"conditioning": Conditioning(subject, given)}).sample
    values, timesteps = module.sample_losses(one, torch.Generator().manual_seed(7), drop=False)
    assert torch.equal(timesteps, by_hand.timesteps)
    torch.testing.assert_close(values, (predicted - by_hand.noise).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"variant": "paper"}, {"variant": "released", "min_snr_gamma": 5.0, "subject_weight": 3.0}], ids=["paper", "released"])
@pytest.mark.parametrize("source", ["pictures", "cache", "cache with the reference"])
def test_several_draws_of_noise_are_as_many_steps_of_one(build_stage2, options, source):
    """Losses of each row, and the mean's gradients."""
    module, one = build_stage2(**options, cache_reference=source == "cache with the reference"), batch(0)
    module.latents = lambda given, generator: (torch.linspace(-1, 1, 192).view(3, 4, 4, 4), torch.linspace(1, -1, 192).view(3, 4, 4, 4))
    given = one if source == "pictures" else CachedBatch(module.features(one), one.subject_mask, one.caption, one.label, one.key, one.caption)
    with torch.no_grad():
        for layer in module.adapter.subject.values():
            layer.lambda_.fill_(0.5)
    noise, timesteps = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([10, 900, 300, 500, 700, 20])

    def stepped(rows: slice, draws: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        module.random_draws = lambda *_: (noise[rows], timesteps[rows], None)
        module.zero_grad(set_to_none=True)
        values, _ = module.sample_losses(given, drop=True, draws=draws)
        values.mean().backward()
        return values.detach(), [p.grad for p in module.adapter.parameters()]

    together, apart = stepped(slice(None), 2), [stepped(slice(draw, None, 2), 1) for draw in (0, 1)]
    torch.testing.assert_close(together[0], torch.stack([values for values, _ in apart], 1).flatten(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together[1], [(a + b) / 2 for a, b in zip(*(grads for _, grads in apart), strict=True)], rtol=1e-3, atol=1e-6)


def test_draws_have_noise_and_timesteps_of_their_own_and_share_what_is_frozen(build_stage2):
    module, calls = build_stage2(noise_draws=4, context_dropout=0.5), {}

    def counted(name, made):
        def call(*inputs):
            calls[name] = calls.get(name, 0) + len(inputs[0])
            return made(*inputs)

        return call

    for name in ("latents", "context_embeds", "encode_text", "reference_features"):
        setattr(module, name, counted(name, getattr(module, name)))
    noise, timesteps, chance = module.random_draws(torch.zeros(3, 4, 4, 4), None, True, 4)
    assert len(noise.flatten(1).unique(dim=0)) == 12 and len(timesteps.unique()) > 6 and chance.shape == (2, 3)
    values, timesteps = module.sample_losses(batch(0), drop=True)
    assert len(values) == len(timesteps) == 12 and calls == {"latents": 3, "context_embeds": 3, "encode_text": 6, "reference_features": 3}


def test_what_the_reference_pass_gave_is_let_go_before_the_noisy_pass(build_stage2):
    """K' and V' hold what they need of it, at the subject's positions."""
    module, given, held = build_stage2(), [], []
    features, unet = module.reference_features, module.unet.forward

    def watched(*inputs):
        reference = features(*inputs)
        given.extend(weakref.ref(tensor) for pair in reference.values() for tensor in pair)
        return reference

    module.reference_features = watched
    module.unet.forward = lambda *inputs, **named: held.append(sum(tensor() is not None for tensor in given)) or unet(*inputs, **named)
    module.sample_losses(batch(0), drop=True)
    assert given and held == [0, 0]


@pytest.mark.filterwarnings("ignore")
def test_training_draws_as_often_as_asked_and_validation_once(build_stage2, tmp_path):
    module, seen = build_stage2(noise_draws=2), []
    forward = module.forward
    module.forward = lambda *inputs: seen.append(len(inputs[0])) or forward(*inputs)
    trainer(tmp_path, 1, limit_val_batches=1).fit(module, loader(0), loader(1))
    assert seen == [6, 3]
    with pytest.raises(ValueError, match="noise_draws 0"):
        build_stage2(noise_draws=0)


def test_a_base_that_predicts_velocity_is_trained_on_it(build_stage2):
    """v = sqrt(a) noise - sqrt(1 - a) latents (Salimans and Ho, 2022), and min-SNR's weight of it, min(SNR, gamma) / (SNR + 1)."""
    module = build_stage2(min_snr_gamma=1.0)
    module.noise_scheduler.register_to_config(prediction_type="v_prediction")
    module.forward = lambda noisy_latents, *rest: torch.zeros_like(noisy_latents)
    by_hand = drawn(module, batch(0), 4)
    velocity, snr = by_hand.signal * by_hand.noise - by_hand.rest * by_hand.latents, (by_hand.signal / by_hand.rest).flatten() ** 2
    expected = velocity.square().mean((1, 2, 3)) * snr.clamp(max=1) / (snr + 1)
    torch.testing.assert_close(module.sample_losses(batch(0), torch.Generator().manual_seed(4), drop=False)[0], expected, rtol=1e-3, atol=1e-6)


def test_embeddings_and_texts_are_dropped_independently_at_their_rates(build_stage2):
    module, seen, latents = build_stage2(context_dropout=0.25, text_dropout=0.5), [], torch.zeros(3, 4, 4, 4)
    module.latents, module.context_embeds = lambda *_: (latents, latents), lambda _: torch.ones(3, EMBED)

    def forward(noisy_latents, timesteps, one, embeds, captions, reference_latents):
        assert set(captions) <= {"", *one.caption} and all(row.unique().numel() == 1 for row in embeds)
        seen.extend((row[0] == 0, text == "") for row, text in zip(embeds, captions, strict=True))
        return noisy_latents

    module.forward = forward
    torch.manual_seed(0)
    for _ in range(500):
        module.sample_losses(batch(0), drop=True)
    embeds, texts = torch.tensor(seen).float().T
    assert [embeds.mean(), texts.mean(), (embeds * texts).mean()] == pytest.approx([0.25, 0.5, 0.125], abs=0.04)


@pytest.mark.filterwarnings("ignore")
def test_dropout_is_for_training_alone(build_stage2, tmp_path):
    module, seen = build_stage2(context_dropout=1.0, text_dropout=1.0), []
    forward = module.forward
    module.forward = lambda *inputs: seen.append((bool(inputs[3].any()), inputs[4])) or forward(*inputs)
    trainer(tmp_path, 1, limit_val_batches=1).fit(module, loader(0), loader(1))
    assert seen == [(False, [""] * 3), (True, ["a cat on a lake"] * 3)]  # a training step, then validation


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_cached_reference_is_of_what_the_variant_sees(build_stage2, variant):
    module, one = build_stage2(variant=variant, cache_reference=True), batch(0)
    shown = torch.where(one.subject_mask > 0.5, one.pixel_values, 1.0) if variant == "paper" else one.pixel_values
    latents = module.vae.encode(shown).latent_dist.mean * module.vae.config.scaling_factor
    expected, found = kept_reference(module.reference_features(latents, one), MaskPyramid(one.subject_mask, (4, 4))), module.features(one)
    assert set(found) == {"moments", "image_embeds", *expected}
    torch.testing.assert_close({name: found[name] for name in expected}, expected)


def test_a_caches_pictures_are_the_autoencoders(build_stage2):
    module, one = build_stage2(), batch(0)
    posterior = module.vae.encode(one.pixel_values).latent_dist
    cached = CachedBatch({"moments": posterior.parameters}, one.subject_mask, one.caption, one.label, one.key, one.caption)
    torch.testing.assert_close(module.pictures(cached), module.vae.decode(posterior.mean).sample)


def test_every_batch_of_the_validation_has_noise_of_its_own(build_stage2):
    """On each rank: a batch's noise is that of its number in the split, whoever reads it."""
    module, seeds = build_stage2(), []
    module.log = lambda *_, **__: None
    module.sample_losses = lambda one, generator, drop, draws: seeds.append(generator.initial_seed()) or (torch.zeros(3), None)
    for rank in (0, 1):
        module._trainer = SimpleNamespace(world_size=2, global_rank=rank)
        for number in range(2):
            module.validation_step(batch(0), number)
    assert seeds == [0, 2, 1, 3]


def test_losses_are_logged_by_quarters_of_the_schedule(build_stage2):
    module, logged = build_stage2(), {}
    module.log_dict = lambda values, batch_size: logged.update(values)
    module._log_bands(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 249, 250, 999]))
    assert list(logged) == [f"train/loss_t{band}" for band in range(4)] and [logged[f"train/loss_t{band}"].item() for band in (0, 1, 3)] == [1.5, 4.0, 8.0]
