"""Tiny random models in hub folder layout, made once a session."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import wandb
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from lightning.pytorch import seed_everything
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from experiments.mini.models import mini_foundation
from experiments.mini.recipe import captions, llava
from moma_lightning.cli import MoMACLI
from moma_lightning.foundation import FoundationConfig
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.modules.stage2 import GridConfig, Stage2, Stage2Config
from moma_lightning.optim import OptimizerConfig
from tests.moma_lightning.one_weight import config
from tests.tiny import tiny_base, tiny_sdxl_base

HIDDEN, EMBED, VISION_WIDTH = 24, 12, 16


def image_processor(size: int) -> CLIPImageProcessor:
    stats = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size, **stats)


def vision_options() -> dict:
    return dict(hidden_size=VISION_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                patch_size=8, projection_dim=EMBED)


def build_llava(tokenizer) -> LlavaForConditionalGeneration:
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2,
                       num_attention_heads=2, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
                       initializer_range=0.5)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**vision_options()), text_config=text,
                         image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=4)
    return LlavaForConditionalGeneration(config).eval()


def write_mllm_and_clip(folder: Path) -> None:
    torch.manual_seed(0)
    processor = LlavaProcessor(image_processor=image_processor(16), tokenizer=llava.build_tokenizer(), patch_size=8,
                               num_additional_image_tokens=1, vision_feature_select_strategy="default")
    for part in (processor, build_llava(processor.tokenizer)):
        part.save_pretrained(folder / "llava")
    for part in (image_processor(16), CLIPVisionModelWithProjection(CLIPVisionConfig(**vision_options()))):
        part.save_pretrained(folder / "image_encoder")
    tokenizer = captions.build_tokenizer()
    text = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=captions.MAX_TOKENS, projection_dim=EMBED, eos_token_id=tokenizer.eos_token_id)
    for part in (tokenizer, CLIPModel(CLIPConfig(text_config=text, vision_config=vision_options(), projection_dim=EMBED))):
        part.save_pretrained(folder / "clip")


def write_base(folder: Path) -> None:
    base = tiny_base()
    pipe = StableDiffusionPipeline(base.vae, base.text_encoder, base.tokenizer, base.unet, base.scheduler, None, None, requires_safety_checker=False)
    pipe.save_pretrained(folder)


def write_sdxl_base(folder: Path) -> None:
    base = tiny_sdxl_base()
    pipe = StableDiffusionXLPipeline(base.vae, base.text_encoder, base.text_encoder_2, base.tokenizer, base.tokenizer_2, base.unet, base.scheduler)
    pipe.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_foundation(tmp_path_factory) -> FoundationConfig:
    """LLaVA, CLIP's image encoder and (beside them, in `clip`) the whole CLIP, with random weights."""
    folder = tmp_path_factory.mktemp("foundation")
    write_mllm_and_clip(folder)
    return mini_foundation(mllm=str(folder / "llava"), image_encoder=str(folder / "image_encoder"))


@pytest.fixture(scope="session")
def foundation(tiny_foundation, tmp_path_factory) -> FoundationConfig:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return mini_foundation(base=str(folder), image_encoder=tiny_foundation.image_encoder, mllm=tiny_foundation.mllm, ip_adapter=None, sam=None)


@pytest.fixture(scope="session")
def sdxl_foundation(foundation, tmp_path_factory) -> FoundationConfig:
    folder = tmp_path_factory.mktemp("sdxl")
    write_sdxl_base(folder)
    return replace(foundation, base=str(folder))


@pytest.fixture(scope="session")
def decoder_folder(foundation, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("decoder")
    ImageFeatureDecoder.from_foundation(foundation, DecoderConfig(), EMBED).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def build_stage2(foundation, decoder_folder):
    def make(**options) -> Stage2:
        seed_everything(0, verbose=False)
        decoder = decoder_folder if options.get("context", "decoder") == "decoder" else None
        optimizer = OptimizerConfig(lr=1e-2, lr_multipliers={"lambda_": 10.0} if options.get("subject", True) else {})
        return Stage2(foundation, Stage2Config(**options), optimizer, decoder, GridConfig(pictures=0))

    return make


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that writes a config and runs `fit` in this process; returns the CLI. wandb forgets its mode afterwards."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)

    def fit(*extra: str, **trainer) -> MoMACLI:
        monkeypatch.setattr(sys, "argv", ["moma_lightning", "fit", "--config", str(config(tmp_path, **trainer)), *extra])
        return MoMACLI()

    yield fit
    wandb.finish()
    wandb.teardown()
