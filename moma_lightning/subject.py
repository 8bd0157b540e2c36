"""The subject of one picture: what is prepared of it once, and how it acts in a call of the pipeline (section 3.2, Figure 3 b)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache

from moma_lightning.models.adapter import MoMAAdapter, Reference, Variant
from moma_lightning.models.attention import Conditioning, ContextConditioning, Recorder, SubjectConditioning
from moma_lightning.models.mask_estimation import estimate_mask, find_label_tokens
from moma_lightning.models.masks import MaskPyramid
from moma_lightning.models.text import token_ids
from moma_lightning.pictures import is_coloured, to_grey, to_rgb


@dataclass
class VariantSettings:
    """Where the paper's text and the authors' released code sample differently (README, "Paper and released code")."""

    white_reference: bool  # the reference pass sees I_wb (paper) or the whole picture
    mask_context: bool  # M_gen also multiplies the context attention
    subject_below: int  # subject attention acts at timesteps below this
    wait_for_mask: bool  # and not before a first M_gen exists: ours, where the released code would act unmasked; it shows where the first t is below 950


VARIANTS: dict[Variant, VariantSettings] = {
    "paper": VariantSettings(white_reference=True, mask_context=False, subject_below=1000, wait_for_mask=False),
    "released": VariantSettings(white_reference=False, mask_context=True, subject_below=950, wait_for_mask=True),
}


@dataclass
class SubjectSettings:
    """How the subject attention acts in one call; the fields are `MoMAPipeline.__call__`'s arguments."""

    beta: float | Sequence[float] | Tensor
    mask_strength: float
    mask_threshold: float = 0.2
    mask_layers: Sequence[int] | None = None
    guide_subject: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.mask_strength <= 1:
            raise ValueError(f"mask_strength {self.mask_strength}: 1 masks fully, 0 not at all; give a number from 0 to 1")
        if not torch.as_tensor(self.beta).min() >= 0:
            raise ValueError(f"beta {self.beta}: the subject attention's strength is 0 or more")
        if not 0 <= self.mask_threshold < 1:
            raise ValueError(f"mask_threshold {self.mask_threshold}: the label's attention is scaled to [0, 1], and more than the threshold is subject")
        if self.mask_layers is not None and not len(self.mask_layers):
            raise ValueError("mask_layers names no layer: give None for all")


@dataclass
class Subject:
    """What is made once per reference picture and shared by all its prompts, seeds and steps."""

    pixels: Float[Tensor, "1 3 height width"]
    white_background: Float[Tensor, "1 3 height width"]
    features: Reference
    mask: Float[Tensor, "1 1 height width"]
    latent_size: tuple[int, int]
    label: str
    variant: Variant  # of the adapter that it was prepared for
    dtype: torch.dtype  # of the UNet that it was prepared by
    loras: frozenset[tuple[str, float, float]] = frozenset()  # that acted in that UNet and the text encoders
    mllm_cache: DynamicCache | None = None  # of the picture as the MLLM has read it, once a prompt asks for it


class SubjectGuide:
    """The subject side of one call: K', V' made once, M_gen(t) carried from each step to the next (Figure 3 b).

    label_tokens: which tokens of each prompt are the label's. repeats: pictures a prompt. guided: each picture has two rows, the unconditional first.
    """

    def __init__(self, adapter: MoMAAdapter, subject: Subject, label_tokens: Float[Tensor, "prompts text"], repeats: int,
                 guided: bool, latent_size: Sequence[int], settings: SubjectSettings):
        if subject.variant != adapter.variant:
            raise ValueError(f"the subject was prepared for a {subject.variant!r} adapter, this one is {adapter.variant!r}: prepare it anew")
        self.variant, self.settings, self.latent_size = VARIANTS[adapter.variant], settings, (latent_size[0], latent_size[1])
        self.guided = guided
        reference_mask = MaskPyramid(subject.mask, subject.latent_size, settings.mask_strength)
        self.keys = adapter.subject_conditioning(subject.features, reference_mask).keys
        self.label_tokens = label_tokens.repeat_interleave(repeats, 0)
        beta = torch.as_tensor(settings.beta, dtype=torch.float32, device=label_tokens.device).expand(len(label_tokens)).repeat_interleave(repeats)
        unconditional = torch.zeros_like(beta) if settings.guide_subject else beta
        self.beta = (torch.cat([unconditional, beta]) if guided else beta)[:, None]  # of each row
        self.is_silent = not adapter.has_subject or not beta.any()
        self.mask_context = self.variant.mask_context and adapter.has_subject
        self.generated_mask: Float[Tensor, "batch 1 h w"] | None = None
        self.has_acted = False
        self.resolutions: set[int] = set()  # of the UNet's attention layers, in positions, as the first step has shown them

    def conditioning(self, t: float, context: ContextConditioning | None, recorder: Recorder) -> Conditioning:
        waiting = self.variant.wait_for_mask and self.generated_mask is None
        acts = not self.is_silent and t < self.variant.subject_below and not waiting
        self.has_acted |= acts
        pyramid = None
        if self.generated_mask is not None:
            mask = torch.cat([self.generated_mask] * 2) if self.guided else self.generated_mask
            pyramid = MaskPyramid(mask, self.latent_size, self.settings.mask_strength)
        subject = SubjectConditioning(self.keys, pyramid, self.beta, self.resolutions) if acts else None
        if context is not None and self.mask_context:
            context.generated_mask = pyramid
        return Conditioning(subject, context, recorder)

    def update(self, recorder: Recorder) -> Float[Tensor, "batch 1 h w"]:
        layers = self.settings.mask_layers
        maps = recorder.label_maps
        self.resolutions = {m.shape[-1] for m in maps.values()}
        if layers is not None:
            if unknown := sorted(set(layers) - set(maps)):
                raise ValueError(f"mask_layers {unknown} are no cross-attention layers: choose among {sorted(maps)}")
            maps = {i: maps[i] for i in layers}
        self.generated_mask = estimate_mask(maps, self.latent_size, self.settings.mask_threshold)
        return self.generated_mask


def label_tokens(tokenizers: Sequence[Any], prompts: Sequence[str], label: str) -> Float[Tensor, "prompts text"]:
    """Which tokens of each prompt are the label's: as it is written, and its plural.

    SDXL reads a prompt with two tokenizers and lays their hidden states side by side, token by token. Raises ValueError where
    they put the label at different places: no row of the attention would be the label's.
    """
    found = [_label_tokens(tokenizer, prompts, label) for tokenizer in tokenizers]
    if any(not torch.equal(other, found[0]) for other in found[1:]):
        raise ValueError(f"the base's two tokenizers put {label!r} at different tokens of a prompt, so that its attention map cannot be read")
    return found[0]


def _label_tokens(tokenizer: Any, prompts: Sequence[str], label: str) -> Float[Tensor, "prompts text"]:
    spellings = [tokenizer(word, add_special_tokens=False).input_ids for word in (label, f"{label}s")]
    return find_label_tokens(token_ids(tokenizer, list(prompts)), spellings, prompts, label)


@torch.no_grad()
def acting_loras(*models: nn.Module) -> frozenset[tuple[str, float, float]]:
    """Name, scale and a sum of the weights of each LoRA (or other adapter of peft) that acts in the models, layer by layer; diffusers gives the next
    one the name of one that went.

    What is fused into the models' weights without a trace is not seen.
    """
    if not any(getattr(model, "peft_config", None) for model in models):  # peft is an extra, and this its sign
        return frozenset()
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer) and not module.disable_adapters]

    def weights(layer: nn.Module, name: str) -> list[Tensor]:
        return [weight for key, weight in layer.named_parameters() if name in key.split(".")]

    def scale(layer: Any, name: str) -> float:
        return getattr(layer, "scaling", {}).get(name, 1.0)  # not every adapter has one

    return frozenset(
        (name, scale(layer, name), round(sum(float(weight.sum(dtype=torch.float64)) for weight in own), 6))
        for layer in layers for name in layer.active_adapters if (own := weights(layer, name))
    )


def picture_pixels(image: Image.Image, area: int, multiple: int) -> Float[Tensor, "1 3 height width"]:
    """The picture in [-1, 1], upright, scaled to about `area` pixels with sides that are multiples of `multiple`."""
    image = to_rgb(image)
    scale = (area / (image.width * image.height)) ** 0.5
    width, height = (max(1, round(side * scale / multiple)) * multiple for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return to_pixels(image)


def to_pixels(image: Image.Image) -> Float[Tensor, "1 3 height width"]:
    """A picture in [-1, 1], as it is."""
    array = np.array(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1)[None].div(127.5).sub(1)


def foreground(mask: Image.Image | Tensor, shown: tuple[int, int], size: Sequence[int]) -> Float[Tensor, "1 1 height width"]:
    """M_ref as 0 / 1 at `size`, (height, width); `shown` is the picture's own (width, height), upright.

    Half grey decides, so that JPEG noise is not foreground; a mask that is a picture is turned as its EXIF says. A tensor is in 0..255
    where it holds bytes, else in 0..1.

    Raises TypeError for what is neither picture nor tensor, ValueError for a picture in colours (a cut-out, whose brightness is no mask), and where the
    proportions differ by over 5 %: it is another picture's mask, or the same one's lying on its side.
    """
    if isinstance(mask, Image.Image):
        if is_coloured(mask):
            raise ValueError("the mask is a picture in colours: give one that is white on black; that of a cut-out is its alpha channel, getchannel('A')")
        mask = torch.from_numpy(np.array(to_grey(mask), dtype=np.float32) / 255)
    elif not isinstance(mask, Tensor):
        raise TypeError(f"a mask is a PIL image or a tensor, not {type(mask).__name__}")
    elif mask.dtype == torch.uint8:
        mask = mask / 255
    height, width = mask.shape[-2:]
    if mask.numel() != height * width:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} has several channels, or has them last: give height x width")
    if not 0.95 < width * shown[1] / (height * shown[0]) < 1.05:
        raise ValueError(f"a mask of {width}x{height} does not fit a picture that is shown at {shown[0]}x{shown[1]}: give one of the picture as it is shown")
    mask = mask.float().reshape(1, 1, height, width)
    return (nn.functional.interpolate(mask, tuple(size), mode="nearest-exact") > 0.5).float()
