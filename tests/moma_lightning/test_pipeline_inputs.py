"""What a call of the pipeline refuses, and what it warns of."""

import copy
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, OFTConfig, inject_adapter_in_model
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from moma_lightning.foundation import ImageEncoder
from moma_lightning.pipeline import MoMAPipeline
from moma_lightning.subject import acting_loras
from tests.moma_lightning.test_pipeline import picture, run, square_mask
from tests.tiny import tiny_adapter, tiny_base


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_a_mask_strength_that_is_none_is_refused(base, strength):
    with pytest.raises(ValueError, match=f"mask_strength {strength}: .* from 0 to 1"):
        run(MoMAPipeline.from_base(base, tiny_adapter(base)), image=picture(), mask=square_mask(), label="cat", mask_strength=strength)


def test_one_step_is_too_few_for_a_subject_that_waits_for_a_mask(base):
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base, "released"))
    reference = {"image": picture(), "mask": square_mask(), "label": "cat"}
    with pytest.warns(UserWarning, match="acted in no step"):
        run(pipe, **reference, num_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(pipe, **reference, num_inference_steps=3)
        run(pipe, **reference, num_inference_steps=1, beta=0.0)


def test_clear_errors(base):
    pipe = MoMAPipeline.from_base(base, tiny_adapter(base))
    with pytest.raises(ValueError, match=r"'dog' does not occur in the prompt 'a cat on the beach'"):
        run(pipe, image=picture(), mask=square_mask(), label="dog")
    with pytest.raises(ValueError, match="mask of 'cat' is empty"):
        run(pipe, image=picture(), mask=torch.zeros(1, 64, 64), label="cat")
    with pytest.raises(ValueError, match="no mask was given"):
        run(pipe, image=picture(), label="cat")
    with pytest.raises(ValueError, match="needs an adapter"):
        run(MoMAPipeline.from_base(base), image=picture(), mask=square_mask(), label="cat", image_embeds=None)
    with pytest.raises(ValueError, match="image_embeds need an adapter"):
        run(MoMAPipeline.from_base(base))
    with pytest.raises(ValueError, match="height 60 and width 64 have to be divisible by"):
        run(pipe, height=60, width=64)
    with pytest.raises(ValueError, match="needs a decoder or a CLIP image encoder"):
        run(pipe, image=picture(), mask=square_mask(), label="cat", image_embeds=None)
    for options in ({"num_inference_steps": -5}, {"num_images_per_prompt": 0}, {"prompt": []}):
        with pytest.raises(ValueError, match="has to be 1 at least"):
            run(pipe, **options)
    for scale in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="guidance_scale"):
            run(pipe, guidance_scale=scale)


def test_a_subject_is_of_one_mask_one_label_and_weights_of_one_dtype(base):
    pipe = MoMAPipeline.from_base(copy.deepcopy(base), tiny_adapter(base))
    subject = pipe.prepare_subject(picture(), square_mask(), "cat", 64 * 64)
    same = run(pipe, image=subject).images
    assert np.array_equal(run(pipe, image=subject, label="cat").images, same) and pipe.guidance_scale == 3.0
    for other in ({"label": "dog"}, {"mask": square_mask()}):
        with pytest.raises(ValueError, match="prepared with a mask and the label 'cat'"):
            run(pipe, image=subject, **other)
    pipe.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"prepared in torch.float32, the UNet is in torch.bfloat16 now"):
        run(pipe, image=subject)


def test_a_subject_is_of_the_loras_that_acted_when_it_was_prepared(base):
    pipe = MoMAPipeline.from_base(copy.deepcopy(base), tiny_adapter(base))
    subjects = {"none": pipe.prepare_subject(picture(), square_mask(), "cat", 64 * 64)}
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False), "style")
    subjects["style"] = pipe.prepare_subject(picture(), square_mask(), "cat", 64 * 64)

    def fitting():
        return [name for name, subject in subjects.items() if subject.loras == acting_loras(pipe.unet, pipe.text_encoder)]

    with pytest.raises(ValueError, match="LoRAs were loaded, let go or scaled .* prepare it anew"):
        run(pipe, image=subjects["none"])
    assert len(run(pipe, image=subjects["style"]).images) == 2 and fitting() == ["style"]
    pipe.unet.set_adapters("style", 0.5)
    assert fitting() == []
    pipe.unet.disable_lora()
    assert fitting() == ["none"]
    pipe.unet.unload_lora()
    assert fitting() == ["none"]
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False), "style")
    assert fitting() == [], "another of the same name and scale"


def test_a_subject_is_of_the_text_encoders_loras_and_of_other_adapters_too(base):
    """The label is read by the text encoder; OFT has no scale."""
    pipe = MoMAPipeline.from_base(copy.deepcopy(base), tiny_adapter(base))
    before = pipe.prepare_subject(picture(), square_mask(), "cat", 64 * 64)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False), pipe.text_encoder, "style")
    with pytest.raises(ValueError, match="LoRAs were loaded"):
        run(pipe, image=before)
    pipe.unet.add_adapter(OFTConfig(oft_block_size=4, target_modules=["to_q"]), "turned")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of weights that a loaded adapter leaves with gradients
        subject = pipe.prepare_subject(picture(), square_mask(), "cat", 64 * 64)
    assert {(name, scale) for name, scale, _ in subject.loras} == {("style", 1.0), ("turned", 1.0)}
    assert len(run(pipe, image=subject).images) == 2


def test_pictures_that_are_not_finite_are_refused(base):
    """Pillow would make them black."""
    pipe = MoMAPipeline.from_base(base)
    with pytest.raises(ValueError, match="not finite: weights of the adapter or the base are damaged"):
        pipe("a cat", num_inference_steps=1, latents=torch.full((1, 4, 8, 8), float("nan")))


def test_parts_that_do_not_belong_together_are_refused(base):
    small = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8, projection_dim=7)
    clip = ImageEncoder(CLIPVisionModelWithProjection(small), CLIPImageProcessor())
    with pytest.raises(ValueError, match="the image encoder makes embeddings of 7, the adapter's projector reads 24"):
        MoMAPipeline.from_base(base, tiny_adapter(base), clip=clip)
