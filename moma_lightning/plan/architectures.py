"""An experiment's models from their configs alone: no weights, no download; on whatever device the caller has switched to."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from moma_lightning.foundation import STABLE_DIFFUSION_SCHEDULE, Base, FoundationConfig, ImageEncoder, frozen
from moma_lightning.hub import hub_name, local_path
from moma_lightning.models.adapter import install_processors
from moma_lightning.models.caption_encoder import CaptionEncoder
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.single_file import is_single_file

#: Public architectures by their hub name, written from the models' own descriptions: `<owner>/<name>/[path/]config.json`.
CONFIGS = Path(__file__).parent / "configs"
#: Of an instruction beside the picture's tokens: about what a BLIP-2 caption in the paper's template has.
INSTRUCTION_TOKENS = 32
#: Families (`model_type`) that can be run without values.
PLANNED_MLLMS = ("llava", "llava_onevision", "idefics3", "smolvlm")


def read(name: str, part: str = "") -> dict[str, Any]:
    """A model's `config.json`: from its folder here, else from the public architectures shipped with the planner.

    Raises FileNotFoundError that says where to put one.
    """
    folder = local_path(name)
    if folder is None:
        hub = hub_name(name)
        folder = CONFIGS / hub.repo_id / (hub.path or "")
    path = folder / part / "config.json"
    if not path.is_file():
        known = sorted("/".join(p.relative_to(CONFIGS).parts[:2]) for p in CONFIGS.glob("*/*"))
        raise FileNotFoundError(f"{name}: no architecture at {path}. Known without a download: {', '.join(known)}; put another one's config.json there")
    return json.loads(path.read_text())


class Words(CLIPTokenizer):
    """In a tokenizer's place: what is planned needs the number of tokens, not which."""

    def __init__(self, model_max_length: int):
        object.__setattr__(self, "model_max_length", model_max_length)

    def __call__(self, texts: list[str], **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.zeros(len(texts), self.model_max_length, dtype=torch.long))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new parameters are of that type; tensors without data cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_base(config: FoundationConfig) -> Base:
    configs = config.base_config if is_single_file(config.base) and config.base_config else config.base
    unet = UNet2DConditionModel.from_config(read(configs, "unet"))
    vae = AutoencoderKL.from_config(read(config.vae) if config.vae else read(configs, "vae"))
    text_encoder = CLIPTextModel(CLIPTextConfig(**read(configs, "text_encoder")))
    install_processors(unet)
    words = Words(text_encoder.config.max_position_embeddings)
    base = Base(frozen(unet), frozen(vae), frozen(text_encoder), words, DDIMScheduler(**STABLE_DIFFUSION_SCHEDULE))
    if unet.config.addition_embed_type == "text_time":  # SDXL
        second = CLIPTextModelWithProjection(CLIPTextConfig(**read(configs, "text_encoder_2")))
        base = replace(base, text_encoder_2=frozen(second), tokenizer_2=words)
    return base


def image_processor(size: int) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def build_image_encoder(config: FoundationConfig) -> ImageEncoder:
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**read(config.image_encoder)))
    return ImageEncoder(model, image_processor(model.config.image_size))


def build_caption_encoder(name: str) -> CaptionEncoder:
    return CaptionEncoder(CLIPModel(CLIPConfig(**read(name))), tokenizer=None)


def build_decoder(config: FoundationConfig, decoder: DecoderConfig, embed_dim: int, dtype: torch.dtype = torch.float32) -> ImageFeatureDecoder:
    """A decoder that reads every instruction as `INSTRUCTION_TOKENS` words around the picture's tokens.

    Raises ValueError for MLLMs that look at values that a planned picture has not (Qwen-VL: which patches share a window).
    """
    with default_dtype(dtype):
        mllm = build_mllm(config.mllm)
    processor = LlavaProcessor.__new__(LlavaProcessor)
    processor.tokenizer, processor.image_token = None, "<image>"
    processor.image_processor = image_processor(mllm.config.vision_config.image_size)
    with adapters_stay() if decoder.lora else nullcontext():
        model = ImageFeatureDecoder(mllm, processor, embed_dim, decoder)

    def tokenize(label: list[str], prompt: list[str], image_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.zeros(len(label), INSTRUCTION_TOKENS + image_tokens, dtype=torch.long)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    model.tokenize = tokenize  # type: ignore[method-assign]
    return model


@contextmanager
def adapters_stay() -> Iterator[None]:
    """Inside, modules are not moved: peft moves new adapters to the frozen weight's device, where they are, and tensors without data cannot be."""
    before = nn.Module.to
    nn.Module.to = lambda self, *args, **kwargs: self
    try:
        yield
    finally:
        nn.Module.to = before


def build_mllm(name: str) -> PreTrainedModel:
    options = {"model_type": "llava"} | read(name)
    family = options.pop("model_type")
    if family not in PLANNED_MLLMS:
        raise ValueError(f"{name} is of the family {family!r}: only stages with {', '.join(PLANNED_MLLMS)} can be planned")
    config = CONFIG_MAPPING[family](**options)
    mllm = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)
    if family in ("idefics3", "smolvlm"):
        mllm.model.get_image_features = partial(see_all, mllm.model)
    return mllm


def see_all(inner: Any, pixel_values: torch.Tensor, return_dict: bool) -> BaseModelOutputWithPooling:
    """Idefics3's `get_image_features` of one tile a picture, but for leaving out pictures that are all 0, which it looks at values for."""
    output = inner.vision_model(pixel_values.flatten(0, 1).to(inner.dtype), return_dict=return_dict)
    output.pooler_output = list(inner.connector(output.last_hidden_state))
    return output
