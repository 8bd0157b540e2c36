"""The paper's own sizes on the meta device: parameter counts, names, and a stage-1 step of LLaVA-1.5-7B; nothing is computed, every shape is."""

import re
from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessor, LlavaProcessor

from experiments.mini.recipe import llava
from moma_lightning import losses, optim
from moma_lightning.checkpoints import CheckpointError, adapter_state, load_into
from moma_lightning.checkpoints.released_mllm import PASSED_OVER, renamed
from moma_lightning.foundation import Base, FoundationConfig
from moma_lightning.models.adapter import MoMAAdapter, install_processors
from moma_lightning.models.attention import Conditioning
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.models.masks import MaskPyramid
from moma_lightning.plan import architectures
from tests import true_size
from tests.true_size import count, sd15_unet


def decoder(**options) -> ImageFeatureDecoder:
    """LLaVA-1.5-7B with the mini world's tokenizer, whose image token the model is told of: the real one is not here."""
    tokenizer = llava.build_tokenizer()
    processor = LlavaProcessor(image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336), tokenizer=tokenizer, patch_size=14,
                               num_additional_image_tokens=1, vision_feature_select_strategy="default")
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
            "vision_tower.": "vision_tower.vision_tower."}
    original = ["lm_head.weight"]
    for name in made.mllm.state_dict():
        for ours, theirs in back.items():
            name = name.replace(ours, theirs)
        original.append(f"model.{name}")
    assert "model.layers.31.mlp.down_proj.weight" in original and "model.mm_projector.2.bias" in original and "model.embed_tokens.weight" in original
    read = {renamed(name, Path("x")) for name in original if not re.search(PASSED_OVER, name)}
    assert read == {name for name in made.own_parameters() if name.startswith("mllm.")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stage_1_step_of_llava_7b(dtype):
    """Forward, Eq. 4, backward and AdamW at 512 pixels: every trained parameter gets a gradient of its shape, the vision tower none."""
    made = decoder().to(dtype).train()
    pictures, target = torch.empty(2, 3, 512, 512, device="meta", dtype=dtype), torch.empty(2, 1024, device="meta")
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


def test_the_planners_configs_have_the_same_sizes():
    """Those of the step that `experiments.true_size` measures, too."""
    config = FoundationConfig.from_yaml("experiments/sd15_llava7b/foundation.yaml")
    with torch.device("meta"):
        base, encoder = architectures.build_base(config), architectures.build_image_encoder(config)
    assert [round(count(part.parameters()) / 1e6, 2) for part in (base.unet, base.vae, base.text_encoder, encoder)] == [859.52, 83.65, 123.06, 632.08]
    assert count(base.unet.parameters()) == count(sd15_unet().parameters()) and count(encoder.parameters()) == count(true_size.vit_h().parameters())


@pytest.fixture(scope="module")
def sdxl() -> tuple[Base, MoMAAdapter]:
    config = FoundationConfig.from_yaml("experiments/sdxl_llava7b/foundation.yaml")
    with torch.device("meta"):
        base = architectures.build_base(config)
        return base, MoMAAdapter.for_unet(base.unet, true_size.IMAGE_EMBED_DIM)


def test_sdxl_and_its_adapter_have_their_sizes(sdxl):
    """70 transformer blocks (4 + 20 down, 30 + 6 up, 10 in the middle), 10 of them 640 wide and 60 of them 1280."""
    base, adapter = sdxl
    assert [round(count(part.parameters()) / 1e6, 1) for part in (base.unet, base.vae, base.text_encoder, base.text_encoder_2)] == [2567.5, 83.7, 123.1, 694.7]
    widths = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10
    assert [layer.to_k.out_features for layer in adapter.subject.values()] == [layer.to_k_ip.out_features for layer in adapter.context.values()] == widths
    assert sorted(map(int, adapter.subject)) == list(range(0, 140, 2)) and sorted(map(int, adapter.context)) == list(range(1, 140, 2))
    assert count(adapter.subject.parameters()) == sum(2 * h * h + 1 for h in widths) == 204_800_070
    assert count(adapter.context.parameters()) == sum(2 * 2048 * h for h in widths) == 340_787_200
    assert count(adapter.image_proj.parameters()) == 1024 * 4 * 2048 + 4 * 2048 + 2 * 2048 == 8_400_896


def test_the_file_of_sdxls_ip_adapter_has_the_public_layout(sdxl):
    """ip-adapter_sdxl_vit-h: four tokens of 2048 from ViT-H's 1024, and 349 M parameters (698 MB in float16)."""
    state = adapter_state(sdxl[1], subject=False)
    projector = [list(state[f"image_proj.{name}"].shape) for name in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")]
    assert projector == [[8192, 1024], [8192], [2048], [2048]]
    assert list(state["ip_adapter.1.to_k_ip.weight"].shape) == [640, 2048] and list(state["ip_adapter.139.to_v_ip.weight"].shape) == [1280, 2048]
    assert len(state) == 4 + 2 * 70 and round(sum(v.numel() for v in state.values()) * 2 / 1e6) == 698


def test_an_adapter_of_stable_diffusion_15_does_not_fit_sdxl(sdxl):
    with pytest.raises(CheckpointError) as error:
        load_into(sdxl[1], adapter_state(true_size.sd15_adapter()), "sd15/moma.safetensors")
    for part in ("sd15/moma.safetensors does not fit", "image_proj.proj.weight: shape [3072, 1024], expected [8192, 1024]"):
        assert part in str(error.value)


def test_a_stage_2_step_of_sdxl(sdxl):
    """Both attentions of all 140 layers at 1024 x 768 pixels: gradients in the adapter alone."""
    (base, adapter), device = sdxl, torch.device("meta")
    with device:
        text = base.encode_text(["a cat"] * 2, (1024, 768), device)
        latents, mask = torch.empty(2, 4, 128, 96), MaskPyramid(torch.empty(2, 1, 1024, 768), (128, 96))
        subject = adapter.subject_conditioning(adapter.reference_features(base.unet, latents, *text), mask, mask)
        given = {"conditioning": Conditioning(subject, adapter.context_conditioning(torch.empty(2, 1024)))}
        predicted = base.unet(latents, torch.empty(2), **text._asdict(), cross_attention_kwargs=given).sample
    losses.noise_prediction_losses(predicted, torch.empty_like(predicted)).mean().backward()
    assert text.encoder_hidden_states.shape == (2, 77, 2048) and text.added_cond_kwargs["text_embeds"].shape == (2, 1280)
    assert predicted.shape == latents.shape and not any(p.grad is not None for p in base.unet.parameters())
    assert all(p.grad is not None and p.grad.shape == p.shape for p in adapter.parameters())
