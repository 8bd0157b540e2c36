"""Random tiny base models for tests: the real classes, no trained weights, built in well under a second."""

import copy
from functools import lru_cache

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from experiments.mini.recipe.captions import build_tokenizer
from moma_lightning.foundation import Base, frozen
from moma_lightning.models.adapter import MoMAAdapter, install_processors

TEXT_DIM, EMBED_DIM = 32, 24
#: Of the tiny SDXL: its second text encoder's width and pooled embedding.
TEXT_DIM_2, POOLED_DIM = 24, 20


@lru_cache
def _tokenizer() -> CLIPTokenizer:
    return build_tokenizer()  # its merges of equal count come in another order each time


def tiny_tokenizer() -> CLIPTokenizer:
    """A copy for each model: textual inversion adds words to its model's tokenizer."""
    return copy.deepcopy(_tokenizer())


def tiny_unet(channels: tuple[int, ...] = (16, 32), heads: int = 4) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels), up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        cross_attention_dim=TEXT_DIM, attention_head_dim=heads, norm_num_groups=4,
    )


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(4, 4, 8, 8),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64, mid_block_add_attention=False,
    )


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    eos = tokenizer.eos_token_id
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_DIM, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=eos,
    ))


def tiny_scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def tiny_base(seed: int = 0, **unet) -> Base:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    model = tiny_unet(**unet)
    install_processors(model)
    return Base(frozen(model), frozen(tiny_vae()), frozen(tiny_text_encoder(tokenizer)), tokenizer, tiny_scheduler())


def tiny_sdxl_unet() -> UNet2DConditionModel:
    """SDXL's topology: no attention at the first level, several transformer blocks in one and other heads at each of the others."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16, 32), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 2, 4), cross_attention_dim=TEXT_DIM + TEXT_DIM_2, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=POOLED_DIM + 6 * 8,
    )


def tiny_text_encoder_2(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_DIM_2, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, projection_dim=POOLED_DIM,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    ))


def tiny_sdxl_base(seed: int = 0, force_zeros_for_empty_prompt: bool = True) -> Base:
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer()
    tokenizer_2.pad_token = "!"  # as SDXL's own
    unet = tiny_sdxl_unet()
    install_processors(unet)
    return Base(
        frozen(unet), frozen(tiny_vae()), frozen(tiny_text_encoder(tokenizer)), tokenizer, tiny_scheduler(),
        frozen(tiny_text_encoder_2(tokenizer)), tokenizer_2, force_zeros_for_empty_prompt,
    )


def tiny_adapter(base: Base, variant: str = "released", lambda_: float = 0.7, num_tokens: int = 4) -> MoMAAdapter:
    """An adapter whose every parameter is random, so that nothing passes a test by being an identity or a zero."""
    adapter = MoMAAdapter.for_unet(base.unet, EMBED_DIM, num_tokens=num_tokens, variant=variant)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.fill_(lambda_) if name.endswith("lambda_") else parameter.add_(0.2 * torch.randn_like(parameter))
    return frozen(adapter)
