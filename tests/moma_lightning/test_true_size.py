"""The paper's own sizes on the meta device: parameter counts, names, and a stage-1 step of LLaVA-1.5-7B; nothing is computed, every shape is."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPImageProcessor, LlavaProcessor

from experiments.mini.recipe import llava
from experiments.true_size import TEXT, UNET, VAE, VIT_H
from moma_lightning import losses, optim
from moma_lightning.checkpoints.released_mllm import PASSED_OVER, renamed
from moma_lightning.models.adapter import install_processors
from moma_lightning.models.attention import Conditioning
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.models.masks import MaskPyramid
from tests import true_size
from tests.true_size import count, sd15_unet


def decoder(**options) -> ImageFeatureDecoder:
    """LLaVA-1.5-7B with the mini world's tokenizer, whose image token the model is told of: the real one is not here."""
    tokenizer = llava.build_tokenizer()
    processor = LlavaProcessor(image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336), tokenizer=tokenizer, patch_size=14,
                               num_additional_image_tokens=1, vision_feature_select_strategy="default")  # fmt: skip
    model = true_size.llava_7b()
    model.set_attn_implementation("eager")  # sdpa's mask asks for values, which meta tensors do not have
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    with torch.device("meta"):
        return ImageFeatureDecoder(model, processor, true_size.IMAGE_EMBED_DIM, DecoderConfig(**options))


def test_llava_7b_and_its_mapping_have_the_papers_sizes():
    made = decoder(template="released")
    trained = [p for p in made.parameters() if p.requires_grad]
    assert count(made.mapping.parameters()) == 9_437_184 and made.token is None
    assert count(made.mllm.vision_tower.parameters()) == pytest.approx(303.5e6, rel=1e-3)
    assert count(trained) == pytest.approx(6.64e9, rel=2e-3)  # Vicuna without its head, the projector and the mapping


def test_the_released_mllms_names_are_the_decoders_own():
    """Names of LLaVA's authors, made here from transformers'; the vision tower and the head are passed over."""
    made = decoder(template="released")
    back = {"multi_modal_projector.linear_1": "mm_projector.0", "multi_modal_projector.linear_2": "mm_projector.2", "language_model.": "",
            "vision_tower.": "vision_tower.vision_tower."}  # fmt: skip
    original = ["lm_head.weight"]
    for name in made.mllm.state_dict():
        for ours, theirs in back.items():
            name = name.replace(ours, theirs)
        original.append(f"model.{name}")
    assert "model.layers.31.mlp.down_proj.weight" in original and "model.mm_projector.2.bias" in original and "model.embed_tokens.weight" in original
    read = {renamed(name, Path("x")) for name in original if not re.search(PASSED_OVER, name)}
    assert read == {name for name in made.own_parameters() if name.startswith("mllm.")}


def test_a_stage_1_step_of_llava_7b():
    """Forward, Eq. 4, backward and AdamW at 512 pixels: every trained parameter gets a gradient of its shape, the vision tower none."""
    made = decoder().train()
    pictures, target = torch.empty(2, 3, 512, 512, device="meta"), torch.empty(2, 1024, device="meta")
    predicted = made(pictures, ["cat", "toy robot"], ["a cat on the beach", "a toy robot in the snow"])
    assert predicted.shape == (2, 1024)
    losses.image_embedding_loss(predicted, target).backward()
    for name, parameter in made.named_parameters():
        assert (parameter.grad is None) == name.startswith("mllm.vision_tower."), name
    made_for = optim.configure(made.named_parameters(), optim.OptimizerConfig(), 1)
    made_for["optimizer"].step()


def test_a_stage_2_step_of_stable_diffusion():
    """Both attentions of all 32 layers at 512 pixels, through the frozen UNet: gradients in the adapter alone."""
    unet, adapter = sd15_unet(), true_size.sd15_adapter()
    install_processors(unet)
    with torch.device("meta"):
        latents, text, mask = torch.empty(2, 4, 64, 64), torch.empty(2, 77, 768), MaskPyramid(torch.empty(2, 1, 512, 512), (64, 64))
        subject = adapter.subject_conditioning(adapter.reference_features(unet, latents, text), mask, mask)
        context = adapter.context_conditioning(torch.empty(2, 1024))
        predicted = unet(latents, torch.empty(2), text, cross_attention_kwargs={"conditioning": Conditioning(subject, context)}).sample
    losses.noise_prediction_losses(predicted, torch.empty_like(predicted)).mean().backward()
    assert predicted.shape == latents.shape and not any(p.grad is not None for p in unet.parameters())
    assert all(p.grad is not None and p.grad.shape == p.shape for p in adapter.parameters())


def test_the_measured_step_has_the_same_sizes():
    """`experiments.true_size` states the configs once more, for a script needs no tests beside it."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        parts: list[nn.Module] = [UNet2DConditionModel(**UNET), AutoencoderKL(**VAE), CLIPTextModel(CLIPTextConfig(**TEXT)),
                                  CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_H))]  # fmt: skip
    assert [round(count(part.parameters()) / 1e6, 2) for part in parts] == [859.52, 83.65, 123.06, 632.08]
    assert count(parts[0].parameters()) == count(sd15_unet().parameters()) and count(parts[3].parameters()) == count(true_size.vit_h().parameters())
