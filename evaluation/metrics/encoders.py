"""The encoders behind every score, one interface for all of them: DINO and its successors, CLIP, SigLIP 2, DreamSim.

Preprocessing starts from PIL pictures: resizing decoded arrays gives other numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import timm
import torch
from jaxtyping import Float
from PIL import Image
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transform
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, SiglipModel

from evaluation.metrics.configs import ClipConfig, DinoConfig, DreamsimConfig, EncoderConfig, SiglipConfig, name_of, source_of
from moma_lightning.hub import loading, local_path, resolve
from moma_lightning.models.last_layer import only_first_read
from moma_lightning.pictures import to_rgb
from moma_lightning.whole import load_whole, require_vocabulary


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
        self.model = at_size(model or load_dino(config), config.crop).to(self.dtype).eval().requires_grad_(False)
        self.normalize = v2.Normalize(config.mean, config.std, inplace=True)

    def preprocess(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch 3 crop crop"]:
        """Resized, cut and normalised as the config says."""
        # By functions, in one array and in place: transforms as modules, one tensor after the other, take longer than a small picture does to cut.
        pixels = np.stack([np.asarray(self._cut(to_rgb(image, turn=False))) for image in images])
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return self.normalize(values.mul_(1 / 255))  # as v2.ToDtype(scale=True) rounds

    def _cut(self, image: Image.Image) -> Image.Image:
        if image.size == (self.config.crop, self.config.crop) and self.config.resize == self.config.crop:
            return image
        resized = transform.resize(image, [self.config.resize], v2.InterpolationMode(self.config.interpolation))
        return transform.center_crop(resized, [self.config.crop, self.config.crop])

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch dim"]:
        pixels = self.preprocess(images).to(next(self.model.parameters()).device, self.dtype)
        with only_first_read(self._unread()):
            tokens = self.model.forward_features(pixels).float()
        pooled = tokens[:, 0] if self.config.pooling == "cls" else tokens[:, self.model.num_prefix_tokens :].mean(1)
        return F.normalize(pooled, dim=-1)

    def _unread(self) -> nn.Module | None:
        """The last layer where only its CLS token is read; other architectures than these (CaiT) may read its patches once more."""
        plain = self.config.pooling == "cls" and isinstance(self.model, VisionTransformer | Eva) and hasattr(self.model.blocks[-1], "mlp")
        return self.model.blocks[-1] if plain else None


class TwoTowerEncoder(ImageTextEncoder):
    """Both towers of one of transformers' models; pictures go through the processor saved beside its weights."""

    def __init__(self, model_class: Any, config: ClipConfig | SiglipConfig, **tokenizer: Any):
        super().__init__()
        self.dtype = getattr(torch, config.dtype)
        source = source_of(config)
        self.model = load_whole(model_class, name_of(config), source, dtype=self.dtype).eval().requires_grad_(False)
        with loading(name_of(config)):
            self.processor = AutoImageProcessor.from_pretrained(**source, backend=config.backend)
            self.tokenizer = AutoTokenizer.from_pretrained(**source, **tokenizer)
        require_vocabulary(name_of(config), self.tokenizer, self.model.config.text_config.vocab_size)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch dim"]:
        pixels = self.processor(images=[to_rgb(image, turn=False) for image in images], return_tensors="pt").pixel_values
        embeds = self.model.get_image_features(pixels.to(self.model.device, self.dtype)).pooler_output
        return F.normalize(embeds.float(), dim=-1)


class ClipEncoder(TwoTowerEncoder):
    """CLIP's towers, after their projections."""

    def __init__(self, config: ClipConfig):
        super().__init__(CLIPModel, config)

    def encode_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch dim"]:
        with only_first_read(self.model.vision_model.encoder.layers[-1]):
            return super().encode_images(images)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        embeds = self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
        return F.normalize(embeds.float(), dim=-1)


class SiglipEncoder(TwoTowerEncoder):
    """SigLIP 2's towers: the attention-pooled picture, and the last token of a text padded on the right to full length.

    The padding is seen by the text tower, as in its training; there is no attention mask.
    """

    def __init__(self, config: SiglipConfig):
        super().__init__(SiglipModel, config, padding_side="right")
        self.lowercase = config.lowercase

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        given = [text.lower() if self.lowercase else text for text in texts]
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


def load_dino(config: DinoConfig) -> nn.Module:
    """The timm model without its classifier. Raises FileNotFoundError for a path that is not there, ValueError for a model without a CLS token."""
    with loading(name_of(config)):
        model = timm.create_model(timm_name(config.model, config.revision), pretrained=True, num_classes=0)
    if getattr(model, "num_prefix_tokens", 0) < 1:
        raise ValueError(f"{config.model} has no CLS token; DINO similarity needs a ViT with one")
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
