"""The encoders behind DINO, CLIP-I and CLIP-T, one interface for all of them.

Every setting that moves a score (weights, sizes, interpolation, precision) is a field of a frozen dataclass, so that a
protocol can name it. Preprocessing starts from PIL pictures: resizing decoded arrays gives other numbers.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from moma_lightning.foundation import local_path, resolve

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DinoConfig:
    """A timm ViT and how pictures reach it. The defaults are DreamBooth's: ViT-S/16, resize 256 bicubic, centre crop 224.

    model: a timm name, a local folder in timm's hub layout, or a hub id (`<id>@<revision>`).
    """

    model: str = "vit_small_patch16_224.dino"
    resize: int = 256
    crop: int = 224
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


@dataclass(frozen=True)
class ClipConfig:
    """A transformers CLIP folder or hub id (`<id>@<revision>`); pictures go through the processor saved beside its weights."""

    model: str = "openai/clip-vit-base-patch32"
    backend: Literal["pil", "torchvision"] = "pil"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class ImageTextEncoder(nn.Module):
    """Pictures, and for some encoders texts, to unit vectors in float32."""

    def encode_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch dim"]:
        raise NotImplementedError

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        raise NotImplementedError(f"{type(self).__name__} has no text tower")


class DinoEncoder(ImageTextEncoder):
    """The CLS token after the last norm. timm's own crop_pct for DINO, 0.9, is not DreamBooth's: only the config counts."""

    def __init__(self, config: DinoConfig, model: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        self.model = (model or load_timm(config.model)).to(self.dtype).eval().requires_grad_(False)
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
        return F.normalize(self.model.forward_features(pixels)[:, 0].float(), dim=-1)


class ClipEncoder(ImageTextEncoder):
    """Both towers of CLIP, after their projections."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        source = resolve(config.model)
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


class CachedEncoder(ImageTextEncoder):
    """Remembers image embeddings by the picture's pixels, in memory and, given a path, in an .npz file between runs.

    Cosines of unit vectors do not need the pictures again, so scoring goes on where it stopped.
    """

    def __init__(self, encoder: ImageTextEncoder, path: Path | None = None, batch_size: int = 64):
        super().__init__()
        self.encoder, self.path, self.batch_size = encoder, path, batch_size
        self.known: dict[str, Tensor] = {}
        if path is not None and path.exists():
            with np.load(path) as file:
                self.known = dict(zip(file["digests"].tolist(), torch.from_numpy(file["embeds"]), strict=True))

    def encode_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch dim"]:
        digests = [pixel_digest(image) for image in images]
        missing = list({d: image for d, image in zip(digests, images, strict=True) if d not in self.known}.items())
        for start in range(0, len(missing), self.batch_size):
            part = missing[start : start + self.batch_size]
            embeds = self.encoder.encode_images([image for _, image in part]).cpu()
            self.known.update(zip([digest for digest, _ in part], embeds, strict=True))
        return torch.stack([self.known[digest] for digest in digests])

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        return self.encoder.encode_texts(texts).cpu()

    def save(self) -> None:
        if self.path is None or not self.known:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.npz")
        np.savez(beside, digests=np.array(list(self.known)), embeds=torch.stack(list(self.known.values())).numpy())
        beside.replace(self.path)


def pixel_digest(image: Image.Image) -> str:
    """Digest of what is seen (mode, size, pixels), the same for one picture stored in two formats."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def load_timm(name: str) -> nn.Module:
    """A timm model without its classifier: by timm's name, a local folder in timm's hub layout, or a hub id.

    Raises FileNotFoundError for a path that is not there, ValueError for a model without a CLS token.
    """
    if local_path(name) is not None:
        name = f"local-dir:{local_path(name)}"
    elif "/" in name and ":" not in name:
        source = resolve(name)
        name = "hf-hub:" + "@".join(source.values())
    model = timm.create_model(name, pretrained=True, num_classes=0)
    if getattr(model, "num_prefix_tokens", 0) < 1:
        raise ValueError(f"{name} has no CLS token; DINO similarity needs a ViT with one")
    return model


def build_encoders(
    dino: DinoConfig, clip: ClipConfig, cache: Path | None = None, device: str = "cpu"
) -> dict[str, CachedEncoder]:
    """{"dino": ..., "clip": ...} with caches under `cache`, in files named by the encoder's settings and weights."""
    encoders: dict[str, ImageTextEncoder] = {"dino": DinoEncoder(dino), "clip": ClipEncoder(clip)}
    configs: dict[str, DinoConfig | ClipConfig] = {"dino": dino, "clip": clip}
    return {
        name: CachedEncoder(encoder.to(device), cache and cache / f"{name}-{fingerprint(encoder, configs[name])}.npz")
        for name, encoder in encoders.items()
    }


def fingerprint(encoder: nn.Module, config: DinoConfig | ClipConfig) -> str:
    """Twelve digits that change with any setting and any weight."""
    digest = hashlib.sha256(repr(sorted(asdict(config).items())).encode())
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(key.encode() + value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
