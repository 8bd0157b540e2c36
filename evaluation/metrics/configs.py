"""Every setting of an encoder that moves a score (weights, sizes, interpolation, precision), so that a protocol can name it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from moma_lightning.hub import hub_name, local_path, resolve

Precision = Literal["float32", "float16", "bfloat16"]

#: The hub's commits that are pinned here, and the one model each belongs to.
PINNED = {
    "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268": "openai/clip-vit-base-patch32",
    "75de2d55ec2d0b4efc50b3e9ad70dba96a7b2fa2": "google/siglip2-base-patch16-224",
}

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DinoConfig:
    """A timm ViT and how pictures reach it. The defaults are DreamBooth's: ViT-S/16, resize 256 bicubic, centre crop 224.

    model: a timm name, a local folder in timm's hub layout, or a hub id. pooling: the CLS token, or the mean of the patch tokens, after
    the last norm. revision: commit of the hub's `timm/<model>`; None, for want of one to cite: the main branch, at whatever commit the
    cache holds; `protocol.json` records it.
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

    revision: the hub's commit that others pin for this model; it means nothing to a folder. Raises ValueError for another model of the hub
    with this one's: who names a model names its revision, or null.
    """

    model: str = "openai/clip-vit-base-patch32"
    backend: Literal["pil", "torchvision"] = "pil"
    dtype: Precision = "float32"
    revision: str | None = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"

    def __post_init__(self) -> None:
        check_pinned(self.model, self.revision)


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

    def __post_init__(self) -> None:
        check_pinned(self.model, self.revision)


@dataclass(frozen=True)
class DreamsimConfig:
    """A model of the `dreamsim` package (an extra: `pip install -e .[dreamsim]`), with the folder that it downloads weights to.

    model: the ensemble of its paper (Fu et al., NeurIPS 2023), or one of its single models, such as dino_vitb16.
    """

    model: str = "ensemble"
    folder: str = "runs/dreamsim"
    revision: None = None


EncoderConfig = DinoConfig | ClipConfig | SiglipConfig | DreamsimConfig


def check_pinned(model: str, revision: str | None) -> None:
    """Raises ValueError where a revision pinned for one model would be asked of another, as by overriding `model` alone."""
    owner = PINNED.get(revision or "")
    if owner is not None and model.partition("@")[0] != owner and local_path(model) is None:
        raise ValueError(f"{model}: revision {revision} is pinned for {owner}; set `revision` to a commit of {model}, or to null for its main branch")


def source_of(config: ClipConfig | SiglipConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained`: the folder, or the hub id at its revision."""
    source = resolve(config.model)
    is_folder = local_path(config.model) is not None
    return source if is_folder or config.revision is None else {**source, "revision": config.revision}


def hub_names(configs: Iterable[EncoderConfig]) -> list[str]:
    """`owner/name@revision` of the encoders that come from the hub; DreamSim's package fetches its own."""
    return [hub_name_of(config) for config in configs if not isinstance(config, DreamsimConfig) and local_path(config.model) is None]


def hub_name_of(config: DinoConfig | ClipConfig | SiglipConfig) -> str:
    owner = "timm/" if isinstance(config, DinoConfig) and "/" not in config.model else ""
    hub = hub_name(owner + config.model)
    return str(replace(hub, revision=config.revision or hub.revision or "main"))


def name_of(config: EncoderConfig) -> str:
    """Where the encoder's weights are. DreamSim's are names of its package's own; a path that is not there is an error elsewhere."""
    try:
        return config.model if isinstance(config, DreamsimConfig) or local_path(config.model) else hub_name_of(config)
    except FileNotFoundError:
        return config.model
