"""Where frozen base models come from: a local folder (the mini world's are shipped) or a hub id with a pinned revision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    ProcessorMixin,
)

from moma_lightning.families import load_folder
from moma_lightning.hub import has_file, loading, local_path, resolve
from moma_lightning.models.adapter import install_processors
from moma_lightning.models.last_layer import only_first_read
from moma_lightning.models.preprocess import preprocess
from moma_lightning.models.text import TextConditioning, read_twice, sized, token_ids
from moma_lightning.quantization import Quantization, quantized
from moma_lightning.single_file import is_lora, is_single_file, load_single_file
from moma_lightning.whole import load_whole, require_all_weights, require_vocabulary

#: Of weights, as torch calls them.
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class FoundationConfig:
    """Every model is a local folder, a file, or `owner/name[@revision[/path inside]]` on the hub (moma_lightning/hub.py).

    base: Stable Diffusion or SDXL (unet, vae, text encoders and tokenizers, scheduler), or a community checkpoint in one `.safetensors` file, which
    takes configs and tokenizer from base_config, and where it is a LoRA the weights that it changes. vae: another autoencoder instead of the base's.
    image_encoder: CLIP vision tower of the image embeddings. mllm: multimodal LLM of a family in docs/mllms.md. ip_adapter: start of the
    context attention, a MoMA adapter in its place of the subject attention too.
    sam: segmenter for pictures that come without a mask. mllm_dtype: of the MLLM where it is frozen (stage 2, sampling); stage 1
    trains it in float32. (With `precision: bf16-mixed` whatever is frozen is in bfloat16.) mllm_quantization: language model in 8 or 4
    bits, frozen (stage 1 then trains LoRA alone); needs a CUDA GPU.
    """

    base: str
    image_encoder: str
    mllm: str
    base_config: str | None = None
    vae: str | None = None
    ip_adapter: str | None = None
    sam: str | None = None
    mllm_dtype: Dtype = "float32"
    mllm_quantization: Quantization | None = None

    def __post_init__(self):
        # jsonargparse hands a class's option over as "None" where the command line says null.
        for option in fields(self):
            if getattr(self, option.name) == "None":
                setattr(self, option.name, None)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "FoundationConfig":
        """As `foundation: path` has it in an experiment's YAML. Raises OSError for a missing file, ValueError for what is no such config."""
        options = yaml.safe_load((local_path(str(path)) or Path(path)).read_text())
        try:
            return cls(**options)
        except TypeError as error:
            raise ValueError(f"{path} does not name base models as experiments/mini/foundation.yaml does: {error}") from error


@dataclass
class Base:
    """The frozen text-to-image model, with MoMA's attention processors installed.

    scheduler: the paper's DDIM by the noise schedule of own_scheduler, which the model came with.
    What has a second text encoder is SDXL; force_zeros_for_empty_prompt is its word on what no text is: zeros, or an encoded "".
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: SchedulerMixin
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    force_zeros_for_empty_prompt: bool = True
    own_scheduler: SchedulerMixin | None = None

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

    @torch.no_grad()
    def encode_text(self, texts: list[str], size: Sequence[int], device: torch.device) -> TextConditioning:
        """Texts as the UNet reads them for pictures of `size`, (height, width) in pixels."""
        if self.text_encoder_2 is None:
            return TextConditioning(self.text_encoder(token_ids(self.tokenizer, texts).to(device)).last_hidden_state)
        hidden_states, pooled = read_twice(texts, [self.tokenizer, self.tokenizer_2], self.text_encoders, device)
        if self.force_zeros_for_empty_prompt:  # an empty text is zeros then, as the unconditional half was trained
            said = torch.tensor([[float(text != "")] for text in texts], device=device, dtype=pooled.dtype)
            hidden_states, pooled = hidden_states * said[..., None], pooled * said
        return sized(hidden_states, pooled, size)


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


#: What Stable Diffusion was trained with. Some fine-tunes ship another sampler's config that leaves these out, and DDIMScheduler's own
#: defaults (clipped samples, no offset) would then draw other pictures without a word.
STABLE_DIFFUSION_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
                             "set_alpha_to_one": False, "steps_offset": 1}


def load_base(config: FoundationConfig) -> Base:
    """Load the base model in fp32, frozen. Raises FileNotFoundError that says how to fetch what is missing, ValueError for one that is no plain diffusion."""
    vae = None
    if config.vae:
        with loading(config.vae):
            vae = AutoencoderKL.from_pretrained(**resolve(config.vae), torch_dtype=torch.float32)
        require_all_weights(config.vae, {"vae": vae})
    pipe = load_single_file(config.base, config.base_config, vae) if is_single_file(config.base) else load_folder(config.base, vae)
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise ValueError(f"{config.base} is distilled to read its guidance as an input (a latent consistency model), which MoMA's sampler does not give: "
                         "take the model that it was distilled from")
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise ValueError(f"{config.base} has a {type(pipe.scheduler).__name__}: flow matching and EDM are other formulations than MoMA's base is of")
    install_processors(pipe.unet)
    base = Base(frozen(pipe.unet), frozen(pipe.vae), frozen(pipe.text_encoder), pipe.tokenizer, ddim(pipe.scheduler.config), own_scheduler=pipe.scheduler)
    if "text_encoder_2" in pipe.components:
        base = replace(base, text_encoder_2=frozen(pipe.text_encoder_2), tokenizer_2=pipe.tokenizer_2,
                       force_zeros_for_empty_prompt=pipe.config.force_zeros_for_empty_prompt)
    return base


def ddim(config: Mapping[str, Any]) -> DDIMScheduler:
    """The paper's sampler with a base model's own noise schedule; what its config does not say is Stable Diffusion's."""
    return DDIMScheduler.from_config(config, **unsaid(config))


def unsaid(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler's config leaves out of Stable Diffusion's noise schedule."""
    said = set(config) - set(config.get("_use_default_values", ()))
    return {key: value for key, value in STABLE_DIFFUSION_SCHEDULE.items() if key not in said}


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
        with only_first_read(self.model.vision_model.encoder.layers[-1]):
            return self.model(preprocess(pixel_values, self.image_processor).to(self.model.dtype)).image_embeds


def load_image_encoder(config: FoundationConfig) -> ImageEncoder:
    """The CLIP vision tower whose embeddings stage 1 predicts (Eq. 4) and IP-Adapter reads.

    A folder without `preprocessor_config.json` (IP-Adapter's own) gets CLIP's, which is what IP-Adapter's code uses. Raises
    ValueError where that is not the model's picture size.
    """
    name = config.image_encoder
    model = load_whole(CLIPVisionModelWithProjection, name, resolve(name), dtype=torch.float32)
    with loading(name):
        own = has_file(name, "preprocessor_config.json")
        processor = CLIPImageProcessor.from_pretrained(**resolve(name)) if own else CLIPImageProcessor()
    if not own and processor.crop_size["height"] != model.config.image_size:
        raise ValueError(f"{name} has no preprocessor_config.json, and CLIP's own is for 224 pixels, not the model's {model.config.image_size}")
    return ImageEncoder(model, processor)


def image_embed_dim(config: FoundationConfig) -> int:
    """Width of the image encoder's embeddings, from its config alone."""
    with loading(config.image_encoder):
        return CLIPVisionConfig.from_pretrained(**resolve(config.image_encoder)).projection_dim


def vae_name(config: FoundationConfig) -> str:
    """Where the autoencoder is: a folder, a file, or a hub name."""
    name = config.base
    if config.base_config and is_lora(name):
        name = config.base_config
    base = local_path(name)
    return config.vae or (f"{name}/vae" if base is not None and base.is_dir() else name)


def load_mllm(config: FoundationConfig, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The MLLM in `dtype`, quantized where the config says so, and its processor."""
    bits = quantized(config.mllm_quantization, getattr(torch, config.mllm_dtype)) if config.mllm_quantization else {}
    where = resolve(config.mllm)
    model = load_whole(AutoModelForImageTextToText, config.mllm, where, ("lm_head.",), dtype=dtype, **bits)
    with loading(config.mllm):
        processor = AutoProcessor.from_pretrained(**where)
    require_vocabulary(config.mllm, processor.tokenizer, model.config.get_text_config().vocab_size)
    return model, processor


def mllm_width(config: FoundationConfig) -> int:
    """Hidden size of the MLLM's language model, from its config alone."""
    with loading(config.mllm):
        return AutoConfig.from_pretrained(**resolve(config.mllm)).get_text_config().hidden_size
