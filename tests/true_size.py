"""The paper's models at their own size, on the meta device: shapes and names without memory."""

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from moma_lightning.models.adapter import MoMAAdapter

#: runwayml/stable-diffusion-v1-5's unet/config.json, as far as it is not diffusers' default.
SD15_UNET = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2)
#: laion/CLIP-ViT-H-14's vision tower, IP-Adapter's image encoder.
VIT_H = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14, image_size=224,
             projection_dim=1024, hidden_act="gelu")
#: openai/clip-vit-large-patch14-336, LLaVA-1.5's vision tower.
VIT_L_336 = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=336, projection_dim=768)
VICUNA_7B = dict(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, rms_norm_eps=1e-5)
IMAGE_EMBED_DIM = 1024


def sd15_unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**SD15_UNET).requires_grad_(False)


def sd15_adapter(**options) -> MoMAAdapter:
    unet = sd15_unet()
    with torch.device("meta"):
        return MoMAAdapter.for_unet(unet, IMAGE_EMBED_DIM, **options)


def vit_h() -> CLIPVisionModelWithProjection:
    with torch.device("meta"):
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_H))


def llava_config() -> LlavaConfig:
    return LlavaConfig(vision_config=CLIPVisionConfig(**VIT_L_336), text_config=LlamaConfig(**VICUNA_7B), image_token_id=32000, image_seq_length=576)


def llava_7b() -> LlavaForConditionalGeneration:
    with torch.device("meta"):
        return LlavaForConditionalGeneration(llava_config())


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)
