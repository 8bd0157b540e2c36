"""Every score of a group of pictures: the three of the paper, and those that a protocol asks for besides."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from datamodules.dreambooth import load_mask
from evaluation.methods import Reference
from evaluation.metrics import (
    BackgroundAlignment,
    CachedEncoder,
    CopyPaste,
    MaskedSimilarity,
    Masker,
    SeedDiversity,
    SubjectSimilarity,
    TextAlignment,
)
from evaluation.metrics.masked import Mask
from evaluation.protocols import Protocol

#: Column -> encoder, by what is measured.
FIDELITY = {"dino": "dino", "clip_i": "clip", "dinov2": "dinov2", "dinov3": "dinov3", "siglip2_i": "siglip2", "dreamsim": "dreamsim"}
MASKED = {"dino_masked": "dino", "clip_i_masked": "clip"}
TEXT = {"clip_t": "clip", "siglip2_t": "siglip2"}

#: Columns of each kind of pictures. Texture prompts change the subject's look: what it looked like is no measure (paper, Table 1).
COLUMNS_OF = {"real": {*FIDELITY, *MASKED}, "texture": {*TEXT, "diversity"}}
NEEDS_MASKS = {*MASKED, "clip_t_background"}
SAVE_SECONDS = 60


@dataclass
class Judges:
    """What scores are made with. masker: None where no score needs masks."""

    protocol: Protocol
    encoders: Mapping[str, CachedEncoder]
    masker: Masker | None = None
    saved: float = field(default_factory=time.monotonic, init=False)

    @property
    def columns(self) -> list[str]:
        return ["dino", "clip_i", "clip_t", *self.protocol.extra_scores]

    def mask(self, image: Image.Image) -> Mask:
        if self.masker is None:
            raise ValueError("masked scores need a masker")
        return self.masker(image)

    def mask_of_real(self, real: Reference) -> Mask:
        """The data set's own, where it has one and the protocol wants it."""
        return self.mask(real.image) if real.mask_path is None else np.asarray(load_mask(real.mask_path, real.image.size)) > 0

    def save(self) -> None:
        for encoder in self.encoders.values():
            encoder.save()
        self.saved = time.monotonic()

    def save_when_due(self) -> None:
        """A kill loses what was embedded in the last SAVE_SECONDS."""
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()


@dataclass
class Group:
    """Pictures of one subject and kind of prompt. real: what they are compared to. others: real pictures that were not the input.

    per_prompt: pictures in a row that share a prompt. own: the real pictures that `images` are, for the real ones themselves.
    """

    kind: str
    images: list[Image.Image]
    prompts: list[str]
    real: list[Reference]
    reference: Reference | None = None
    others: tuple[Reference, ...] = ()
    per_prompt: int = 1
    own: tuple[Reference, ...] = ()

    @cached_property
    def real_images(self) -> list[Image.Image]:
        return [real.image for real in self.real]

    def masks(self, judges: Judges) -> list[Mask]:
        return [judges.mask_of_real(real) for real in self.own] if self.own else [judges.mask(image) for image in self.images]


def scores_of(group: Group, judges: Judges) -> dict[str, list[float]]:
    """A value a picture for each of the protocol's columns, NaN where the score says nothing of this kind of picture."""
    defined = COLUMNS_OF.get(group.kind)
    nothing = [float("nan")] * len(group.images)
    return {name: column(name, group, judges) if defined is None or name in defined else nothing for name in judges.columns}


def column(name: str, group: Group, judges: Judges) -> list[float]:
    protocol = judges.protocol
    if name in FIDELITY:
        return SubjectSimilarity(judges.encoders[FIDELITY[name]]).of(group.images, group.real_images)
    if name in TEXT:
        return TextAlignment(judges.encoders[TEXT[name]], protocol.text_template, protocol.clip_t_scale).of(group.images, group.prompts)
    if name in MASKED:
        metric = MaskedSimilarity(judges.encoders[MASKED[name]], protocol.mask_background)
        return metric.of(group.images, group.masks(judges), group.real_images, [judges.mask_of_real(real) for real in group.real])
    return OTHERS[name](group, judges)


def background(group: Group, judges: Judges) -> list[float]:
    metric = BackgroundAlignment(judges.encoders["clip"], judges.protocol.text_template, judges.protocol.clip_t_scale)
    return metric.of(group.images, group.masks(judges), group.prompts)


def diversity(group: Group, judges: Judges) -> list[float]:
    metric = SeedDiversity(judges.encoders["dino"])
    for start in range(0, len(group.images), group.per_prompt):
        metric.update(group.images[start : start + group.per_prompt])
    return metric.per_picture().tolist()


def copy_paste(group: Group, judges: Judges) -> list[float]:
    if group.reference is None:
        raise ValueError("the copy-paste score is of generated pictures: there is no input")
    return CopyPaste(judges.encoders["dino"]).of(group.images, group.reference.image, [real.image for real in group.others])


OTHERS: dict[str, Callable[[Group, Judges], list[float]]] = {
    "clip_t_background": background,
    "diversity": diversity,
    "copy_paste": copy_paste,
}
