"""What users of diffusers are used to doing with a pipeline: other schedulers, offloading, attention slicing, IP-Adapters."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

from experiments.mini.models import mini_foundation
from moma_lightning import foundation
from moma_lightning.foundation import load_base
from moma_lightning.pipeline import MoMAPipeline, MoMAPipelineSD, load_pipeline
from tests.moma_lightning.test_pipeline import generators, picture, run, square_mask
from tests.tiny import EMBED_DIM, tiny_adapter, tiny_base

SUBJECT = {"image": picture(), "mask": square_mask(), "label": "cat"}


def stock_of(base) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(base.vae, base.text_encoder, base.tokenizer, base.unet, base.scheduler, None, None, requires_safety_checker=False)


@pytest.fixture
def pipe():
    base = tiny_base()
    return MoMAPipeline.from_base(base, tiny_adapter(base))


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler])
def test_the_first_call_with_another_scheduler_is_stock_diffusers(scheduler):
    """Of some, how large the noise is depends on the number of steps; a second call would have it from the first."""
    base, other = tiny_base(), tiny_base()
    other.unet.set_attn_processor(AttnProcessor2_0())
    stock = stock_of(other)
    pipe, drawn = MoMAPipeline.from_base(base, tiny_adapter(base)), []
    for each, options in ((stock, {"guidance_scale": 3.0, "num_inference_steps": 3}), (pipe, {"image_embeds": None})):
        each.set_progress_bar_config(disable=True)
        each.scheduler = scheduler.from_config(each.scheduler.config, timestep_spacing="leading")  # with others the noise is of one size
        call = {"generator": generators(1), "output_type": "np", **options}
        drawn.append(each(["a cat"], **call).images if each is stock else run(pipe, ["a cat"], **call).images)
    assert np.array_equal(*drawn)


def test_a_call_does_not_depend_on_the_one_before(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    first = run(pipe, **SUBJECT).images
    run(pipe, **SUBJECT, num_inference_steps=7)
    assert np.array_equal(first, run(pipe, **SUBJECT).images)


def test_model_offloading_draws_the_same(pipe):
    expected = run(pipe, **SUBJECT).images
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.maybe_free_model_hooks = Mock(wraps=pipe.maybe_free_model_hooks)
    assert np.array_equal(run(pipe, **SUBJECT).images, expected)
    pipe.maybe_free_model_hooks.assert_called_once_with()
    assert pipe.to("cpu", silence_dtype_warnings=True) is pipe


def test_parts_that_diffusers_does_not_know_are_put_on_the_device(pipe, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "enable_model_cpu_offload", lambda self: None)
    monkeypatch.setattr(MoMAPipeline, "_execution_device", torch.device("meta"))
    pipe.enable_model_cpu_offload()
    assert {parameter.device.type for parameter in pipe.adapter.parameters()} == {"meta"}


@pytest.mark.parametrize("replaced", [lambda pipe: pipe.enable_attention_slicing(), lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0())])
def test_without_momas_attention_nothing_of_the_subject_is_left_out_in_silence(pipe, replaced):
    subject = pipe.prepare_subject(*SUBJECT.values(), 64 * 64)
    replaced(pipe)
    for given in ({}, SUBJECT | {"image_embeds": None}, {"image": subject}):
        with pytest.raises(ValueError, match=r"no longer MoMA's .*install_processors\(pipe.unet\)"):
            run(pipe, **given)
    with pytest.raises(ValueError, match="no longer MoMA's"):
        pipe.prepare_subject(*SUBJECT.values(), 64 * 64)
    assert len(run(pipe, image_embeds=None).images) == 2, "the base alone needs none"


def test_an_ip_adapter_is_read_as_an_adapter(pipe):
    with pytest.raises(ValueError, match="read as any adapter here: load_pipeline"):
        pipe.load_ip_adapter("h94/IP-Adapter", subfolder="models", weight_name="ip-adapter_sd15.safetensors")


def test_a_base_that_reads_its_guidance_is_refused(monkeypatch):
    distilled = load_base(mini_foundation())
    distilled.unet.register_to_config(time_cond_proj_dim=256)
    monkeypatch.setattr(foundation, "load_folder", lambda *_: stock_of(distilled))
    with pytest.raises(ValueError, match="distilled to read its guidance as an input"):
        load_base(mini_foundation())


@pytest.mark.parametrize("image", ["cat.png", [picture()], np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8)])
def test_an_image_is_one_picture(pipe, image):
    with pytest.raises(TypeError, match="image is one PIL picture or a Subject"):
        pipe.prepare_subject(image, None, "cat", 64 * 64)


@pytest.mark.parametrize("mask", [torch.ones(3, 64, 64), torch.ones(64, 64, 2)])
def test_a_mask_has_one_channel(pipe, mask):
    with pytest.raises(ValueError, match="a mask of"):
        pipe.prepare_subject(picture(), mask, "cat", 64 * 64)


@pytest.mark.parametrize("setting, told", [
    ({"beta": [1.0, 0.4, 0.4]}, r"beta of shape \(3,\) for 2 prompts"),
    ({"beta": torch.ones(2, 1)}, r"beta of shape \(2, 1\) for 2 prompts"),
    ({"image_embeds": torch.zeros(3, EMBED_DIM)}, r"image_embeds of shape \(3, .* for 2 prompts"),
    ({"image_embeds": torch.zeros(1, 7)}, rf"image_embeds of shape \(1, 7\): the adapter reads rows of {EMBED_DIM}"),
    ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents of shape \(1, 4, 8, 8\): 2 pictures begin from \(2, 4, height"),
    ({"latents": torch.zeros(2, 3, 8, 8)}, r"latents of shape \(2, 3, .* from \(2, 4, height"),
    ({"image": None}, "mask and label are those of a picture"),
    ({"beta": float("nan")}, "beta nan: .* 0 or more"),
    ({"mask_threshold": 1.0}, "mask_threshold 1.0"),
    ({"mask_threshold": -0.1}, "mask_threshold -0.1"),
    ({"mask_layers": []}, "mask_layers names no layer"),
])
def test_settings_out_of_their_range_are_named(pipe, setting, told):
    with pytest.raises(ValueError, match=told):
        run(pipe, **SUBJECT | setting)


def test_a_subject_without_an_adapter_is_refused(pipe):
    subject = pipe.prepare_subject(*SUBJECT.values(), 64 * 64)
    with pytest.raises(ValueError, match="a Subject and image_embeds need an adapter"):
        run(MoMAPipeline.from_base(tiny_base()), image=subject, image_embeds=None)


def test_beta_may_be_a_tensor(pipe):
    assert np.array_equal(*(run(pipe, **SUBJECT, beta=beta).images for beta in (0.5, torch.tensor(0.5))))


def test_a_subject_of_another_variant_is_refused(pipe):
    base = tiny_base()
    other = MoMAPipeline.from_base(base, tiny_adapter(base, "paper" if pipe.adapter.variant == "released" else "released"))
    with pytest.raises(ValueError, match="the subject was prepared for a"):
        run(other, image=pipe.prepare_subject(*SUBJECT.values(), 64 * 64))


def test_a_unet_of_no_square_pictures_asks_for_sizes(pipe):
    pipe.unet.register_to_config(sample_size=[8, 12])
    with pytest.raises(ValueError, match=r"sample_size is \[8, 12\]: give height and width"):
        run(pipe)
    assert run(pipe, height=64, width=96).images.shape == (2, 64, 96, 3)


def test_a_callback_sees_and_changes_each_steps_latents(pipe):
    seen = []

    def noted(own, step, t, tensors):
        assert own is pipe
        seen.append((step, int(t), tensors["latents"].clone()))
        return {"latents": tensors["latents"] * 0} if step == 2 else {}

    given = dict(num_inference_steps=3, height=16, width=16, output_type="latent", callback_on_step_end=noted)
    images, *_ = pipe("a cat", generator=torch.manual_seed(0), return_dict=False, **given)
    assert [step for step, _, _ in seen] == [0, 1, 2] and [t for _, t, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert not images.any() and seen[2][2].any()


def test_a_callback_can_end_the_drawing(pipe):
    seen = []

    def stopped(own, step, t, tensors):
        seen.append(step)
        own._interrupt = step == 1
        return {}

    given = dict(height=16, width=16, output_type="latent", num_inference_steps=5)
    pipe("a cat", callback_on_step_end=stopped, **given)
    assert seen == [0, 1] and pipe.num_timesteps == 5
    pipe("a cat", **given)
    assert not pipe.interrupt, "the next call draws to its end"


def test_eta_is_the_schedulers(pipe):
    def drawn(eta):
        return pipe("a cat", generator=torch.manual_seed(0), num_inference_steps=3, height=16, width=16, output_type="latent", eta=eta).images

    assert torch.equal(drawn(0.0), drawn(0.0)) and not torch.equal(drawn(0.0), drawn(1.0))


def test_a_folder_of_diffusers_is_no_moma_pipeline():
    for kind in (MoMAPipeline, MoMAPipelineSD):
        with pytest.raises(ValueError, match="load_pipeline"):
            kind.from_pretrained("no/such/folder")


def test_a_dtype_is_named_before_anything_is_read():
    with pytest.raises(ValueError, match="float32, bfloat16, float16 are known"):
        load_pipeline(mini_foundation(base="no/such/folder"), dtype="fp16")


def test_a_sam_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="no/such/sam: neither a folder with config.json"):
        load_pipeline(mini_foundation(base="no/such/folder", sam="no/such/sam"))
