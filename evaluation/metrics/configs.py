"""Every setting of an encoder that moves a score (weights, sizes, interpolation, precision), so that a protocol can name it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from moma_lightning.hub import hub_name, local_path, resolve

Precision = Literal["float32", "float16", "bfloat16"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


#: Commits of the hub that others pin for these models, too.
PINNED = {
    "openai/clip-vit-base-patch32": "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
    "google/siglip2-base-patch16-224": "75de2d55ec2d0b4efc50b3e9ad70dba96a7b2fa2",
}


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

    revision: a commit of the hub; it means nothing to a folder. ValueError for the default model's with another one.
    """

    model: str = "openai/clip-vit-base-patch32"
    backend: Literal["pil", "torchvision"] = "pil"
    dtype: Precision = "float32"
    revision: str | None = PINNED["openai/clip-vit-base-patch32"]

    def __post_init__(self):
        refuse_foreign_revision(self.model, self.revision)


@dataclass(frozen=True)
class SiglipConfig:
    """A transformers SigLIP or SigLIP 2 of fixed resolution (model type `siglip`); the rest as in ClipConfig.

    lowercase: SigLIP 2 was trained on lower-case text.
    """

    model: str = "google/siglip2-base-patch16-224"
    backend: Literal["pil", "torchvision"] = "pil"
    dtype: Precision = "float32"
    lowercase: bool = True
    revision: str | None = PINNED["google/siglip2-base-patch16-224"]

    def __post_init__(self):
        refuse_foreign_revision(self.model, self.revision)


@dataclass(frozen=True)
class DreamsimConfig:
    """A model of the `dreamsim` package (an extra: `pip install -e .[dreamsim]`), with the folder that it downloads weights to.

    model: the ensemble of its paper (Fu et al., NeurIPS 2023), or one of its single models, such as dino_vitb16.
    """

    model: str = "ensemble"
    folder: str = "runs/dreamsim"
    revision: None = None


EncoderConfig = DinoConfig | ClipConfig | SiglipConfig | DreamsimConfig


def refuse_foreign_revision(model: str, revision: str | None) -> None:
    """Whoever names another model of the hub says its revision too, or would get the default model's."""
    owner = {commit: name for name, commit in PINNED.items()}.get(revision or "")
    if owner not in (None, model) and local_path(model) is None:
        raise ValueError(f"revision {revision} is {owner}'s, not {model}'s: set `revision` with `model`, to a commit of its own or to null")


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
            hub = hub_name(owner + config.model)
            names.append(str(replace(hub, revision=config.revision or hub.revision or "main")))
    return names
