"""Where frozen base models come from: a local folder (the mini world's are shipped) or a hub id with a pinned revision."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from moma_lightning.models.adapter import install_processors
from moma_lightning.models.preprocess import preprocess

REPOSITORY = Path(__file__).parents[1]
MINI = "experiments/mini/foundation"


@dataclass
class FoundationConfig:
    """Every field is a local folder or a hub id; `<id>@<revision>` pins a revision.

    base: Stable Diffusion folder (unet, vae, text_encoder, tokenizer, scheduler). vae: another autoencoder instead of the base's.
    image_encoder: CLIP vision tower of the image embeddings. mllm: LLaVA. ip_adapter: start of the context attention.
    sam: segmenter for pictures that come without a mask.
    """

    base: str = f"{MINI}/base"
    vae: str | None = None
    image_encoder: str = f"{MINI}/image_encoder"
    mllm: str = f"{MINI}/llava"
    ip_adapter: str | None = f"{MINI}/ip_adapter/ip-adapter.safetensors"
    sam: str | None = f"{MINI}/sam"


@dataclass
class Base:
    """The frozen text-to-image model, with MoMA's attention processors installed."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: SchedulerMixin


def local_path(path: str) -> Path | None:
    """The existing file or folder `path` means, tried from the working directory and then from the repository."""
    for candidate in (Path(path), REPOSITORY / path):
        if candidate.exists():
            return candidate
    return None


def resolve(path_or_id: str) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for a folder or `<hub id>@<revision>`.

    Raises FileNotFoundError for what looks like a path (more than one slash, or a leading dot) and is not there.
    """
    found = local_path(path_or_id)
    if found is not None:
        return {"pretrained_model_name_or_path": str(found)}
    name, _, revision = path_or_id.partition("@")
    if name.count("/") != 1 or name.startswith("."):
        raise FileNotFoundError(f"{path_or_id}: no such folder here or in {REPOSITORY}, and not a hub id of the form owner/name[@revision]")
    return {"pretrained_model_name_or_path": name} | ({"revision": revision} if revision else {})


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def load_base(config: FoundationConfig) -> Base:
    """Load the base model in fp32, frozen."""
    pipe = StableDiffusionPipeline.from_pretrained(**resolve(config.base), safety_checker=None, requires_safety_checker=False, torch_dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(**resolve(config.vae), torch_dtype=torch.float32) if config.vae else pipe.vae
    install_processors(pipe.unet)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return Base(frozen(pipe.unet), frozen(vae), frozen(pipe.text_encoder), pipe.tokenizer, scheduler)


class ImageEncoder(nn.Module):
    """CLIP's image embedding of pictures in [-1, 1]: resized and normalised as the model's image processor says."""

    def __init__(self, model: CLIPVisionModelWithProjection, image_processor: CLIPImageProcessor):
        super().__init__()
        self.model, self.image_processor = frozen(model), image_processor

    @property
    def embed_dim(self) -> int:
        return self.model.config.projection_dim

    @torch.no_grad()
    def forward(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embed_dim"]:
        return self.model(preprocess(pixel_values, self.image_processor).to(self.model.dtype)).image_embeds


def load_image_encoder(config: FoundationConfig) -> ImageEncoder:
    """The CLIP vision tower whose embeddings stage 1 predicts (Eq. 4) and IP-Adapter reads."""
    where = resolve(config.image_encoder)
    return ImageEncoder(CLIPVisionModelWithProjection.from_pretrained(**where, torch_dtype=torch.float32), CLIPImageProcessor.from_pretrained(**where))


def load_mllm(config: FoundationConfig) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    where = resolve(config.mllm)
    return LlavaForConditionalGeneration.from_pretrained(**where, torch_dtype=torch.float32), LlavaProcessor.from_pretrained(**where)
