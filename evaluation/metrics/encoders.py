"""The encoders behind every score, one interface for all of them: DINO and its successors, CLIP, SigLIP 2.

Every setting that moves a score (weights, sizes, interpolation, precision) is a field of a frozen dataclass, so that a
protocol can name it. Preprocessing starts from PIL pictures: resizing decoded arrays gives other numbers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, SiglipModel

from moma_lightning.foundation import local_path, resolve

Precision = Literal["float32", "float16", "bfloat16"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DinoConfig:
    """A timm ViT and how pictures reach it. The defaults are DreamBooth's: ViT-S/16, resize 256 bicubic, centre crop 224.

    model: a timm name, a local folder in timm's hub layout, or a hub id. pooling: the CLS token, or the mean of the patch tokens, after
    the last norm. revision: commit of the hub's `timm/<model>`; None is whatever is there today. It is None because none could
    be verified where this was written: pin it where the weights are at hand.
    """

    model: str = "vit_small_patch16_224.dino"
    resize: int = 256
    crop: int = 224
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    dtype: Precision = "float32"
    pooling: Literal["cls", "mean"] = "cls"
    revision: str | None = None


@dataclass(frozen=True)
class ClipConfig:
    """A transformers CLIP folder or hub id; pictures go through the processor saved beside its weights.

    revision: the hub's commit that others pin for this model; it means nothing to a folder.
    """

    model: str = "openai/clip-vit-base-patch32"
    backend: Literal["pil", "torchvision"] = "pil"
    dtype: Precision = "float32"
    revision: str | None = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"


@dataclass(frozen=True)
class SiglipConfig:
    """A transformers SigLIP or SigLIP 2 of fixed resolution (model type `siglip`); the rest as in ClipConfig.

    lowercase: SigLIP 2 was trained on lower-case text.
    """

    model: str = "google/siglip2-base-patch16-224"
    backend: Literal["pil", "torchvision"] = "pil"
    dtype: Precision = "float32"
    lowercase: bool = True
    revision: str | None = "75de2d55ec2d0b4efc50b3e9ad70dba96a7b2fa2"


@dataclass(frozen=True)
class DreamsimConfig:
    """A model of the `dreamsim` package (an extra: `pip install -e .[dreamsim]`), with the folder that it downloads weights to.

    model: the ensemble of its paper (Fu et al., NeurIPS 2023), or one of its single models, such as dino_vitb16.
    """

    model: str = "ensemble"
    folder: str = "runs/dreamsim"
    revision: None = None


EncoderConfig = DinoConfig | ClipConfig | SiglipConfig | DreamsimConfig


class ImageTextEncoder(nn.Module):
    """Pictures, and for some encoders texts, to unit vectors in float32."""

    def encode_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch dim"]:
        raise NotImplementedError

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        raise NotImplementedError(f"{type(self).__name__} has no text tower")


class DinoEncoder(ImageTextEncoder):
    """DINO, DINOv2 or DINOv3. timm's own crop_pct for DINO, 0.9, is not DreamBooth's: only the config counts.

    A model made for another picture size (DINOv2: 518) has its position embedding resampled to the crop, by timm.
    """

    def __init__(self, config: DinoConfig, model: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        self.model = at_size(model or load_timm(config.model, config.revision), config.crop).to(self.dtype).eval().requires_grad_(False)
        self.transform = v2.Compose(
            [
                v2.Resize(config.resize, interpolation=v2.InterpolationMode(config.interpolation)),
                v2.CenterCrop(config.crop),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(config.mean, config.std),
            ]
        )

    def preprocess(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch 3 crop crop"]:
        return torch.stack([self.transform(image.convert("RGB")) for image in images])

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch dim"]:
        pixels = self.preprocess(images).to(next(self.model.parameters()).device, self.dtype)
        tokens = self.model.forward_features(pixels).float()
        pooled = tokens[:, 0] if self.config.pooling == "cls" else tokens[:, self.model.num_prefix_tokens :].mean(1)
        return F.normalize(pooled, dim=-1)


class ClipEncoder(ImageTextEncoder):
    """Both towers of CLIP, after their projections."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        source = source_of(config)
        self.model = CLIPModel.from_pretrained(**source, dtype=self.dtype).eval().requires_grad_(False)
        self.processor = AutoImageProcessor.from_pretrained(**source, backend=config.backend)
        self.tokenizer = AutoTokenizer.from_pretrained(**source)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch dim"]:
        pixels = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        embeds = self.model.get_image_features(pixels.to(self.model.device, self.dtype)).pooler_output
        return F.normalize(embeds.float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        embeds = self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
        return F.normalize(embeds.float(), dim=-1)


class SiglipEncoder(ImageTextEncoder):
    """Both towers of SigLIP 2: the attention-pooled picture, and the last token of a text padded on the right to full length.

    The padding is seen by the text tower, as in its training; there is no attention mask.
    """

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        source = source_of(config)
        self.model = SiglipModel.from_pretrained(**source, dtype=self.dtype).eval().requires_grad_(False)
        self.processor = AutoImageProcessor.from_pretrained(**source, backend=config.backend)
        self.tokenizer = AutoTokenizer.from_pretrained(**source, padding_side="right")

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch dim"]:
        pixels = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        embeds = self.model.get_image_features(pixels.to(self.model.device, self.dtype)).pooler_output
        return F.normalize(embeds.float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        given = [text.lower() if self.config.lowercase else text for text in texts]
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(given, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        embeds = self.model.get_text_features(tokens.input_ids.to(self.model.device)).pooler_output
        return F.normalize(embeds.float(), dim=-1)


class DreamsimEncoder(ImageTextEncoder):
    """DreamSim's embedding of pictures squashed to a square: its distance of two pictures is 1 - their cosine.

    The package was tried here without its weights, which could not be fetched. Raises ImportError where it is not installed.
    """

    def __init__(self, config: DreamsimConfig):
        super().__init__()
        try:
            from dreamsim import dreamsim
        except ImportError as error:
            raise ImportError("the score `dreamsim` needs the package dreamsim: pip install -e .[dreamsim]") from error
        self.model, self.transform = dreamsim(pretrained=True, device="cpu", cache_dir=config.folder, dreamsim_type=config.model)
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch dim"]:
        device = next(self.model.parameters()).device
        return F.normalize(self.model.embed(torch.cat([self.transform(image) for image in images]).to(device)).float(), dim=-1)


def source_of(config: ClipConfig | SiglipConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained`: the folder, or the hub id at its revision."""
    source = resolve(config.model)
    is_folder = local_path(config.model) is not None
    return source if is_folder or config.revision is None else {**source, "revision": config.revision}


def hub_names(configs: Iterable[EncoderConfig]) -> list[str]:
    """`owner/name@revision` of the encoders that come from the hub; DreamSim's package fetches its own."""
    names = []
    for config in configs:
        if not isinstance(config, DreamsimConfig) and local_path(config.model) is None:
            owner = "timm/" if isinstance(config, DinoConfig) and "/" not in config.model else ""
            names.append(f"{owner}{config.model}@{config.revision or 'main'}")
    return names


def load_timm(name: str, revision: str | None = None) -> nn.Module:
    """A timm model without its classifier: by timm's name, a local folder in timm's hub layout, or a hub id.

    Raises FileNotFoundError for a path that is not there, ValueError for a model without a CLS token.
    """
    model = timm.create_model(timm_name(name, revision), pretrained=True, num_classes=0)
    if getattr(model, "num_prefix_tokens", 0) < 1:
        raise ValueError(f"{name} has no CLS token; DINO similarity needs a ViT with one")
    return model


def timm_name(name: str, revision: str | None) -> str:
    """What `timm.create_model` calls it. A revision makes a plain timm name a hub id: all of timm's weights are below `timm/`."""
    if local_path(name) is not None:
        return f"local-dir:{local_path(name)}"
    if revision is not None and "/" not in name:
        name = f"timm/{name}"
    if "/" not in name or ":" in name:
        return name
    source = resolve(name) | ({} if revision is None else {"revision": revision})
    return "hf-hub:" + "@".join(source.values())


def at_size(model: nn.Module, size: int) -> nn.Module:
    """The model with its position embedding for `size` x `size` pixels; models that take any size are left alone."""
    if not getattr(model, "dynamic_img_size", False) and model.patch_embed.img_size != (size, size):
        model.set_input_size(img_size=size)
    return model


def build_encoder(config: EncoderConfig) -> ImageTextEncoder:
    if isinstance(config, DinoConfig):
        return DinoEncoder(config)
    if isinstance(config, DreamsimConfig):
        return DreamsimEncoder(config)
    return SiglipEncoder(config) if isinstance(config, SiglipConfig) else ClipEncoder(config)
