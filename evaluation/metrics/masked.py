"""Subject and background apart: DINO and CLIP-I of the subject alone, CLIP-T of what is around it.

On the whole picture a method gains DINO by copying the reference's background, and CLIP-T by dropping the subject for the scene.
With the picture taken apart by a mask neither helps.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image

from evaluation.metrics.encoders import ImageTextEncoder
from evaluation.metrics.subject_fidelity import SubjectSimilarity
from evaluation.metrics.text_alignment import TextAlignment

Mask = Bool[np.ndarray, "height width"]

COLORS = {"white": (255, 255, 255), "grey": (128, 128, 128)}


def subject_alone(image: Image.Image, mask: Mask, background: str = "white") -> Image.Image:
    """The subject in its place, everything else in one colour. Raises ValueError for a mask of another size."""
    return painted(image, ~mask, COLORS[background])


def background_alone(image: Image.Image, mask: Mask) -> Image.Image:
    """The picture with its subject painted over in the mean colour of the rest."""
    pixels = np.asarray(image.convert("RGB"))
    refuse_other_size(image, mask)
    return painted(image, mask, tuple(pixels[~mask].mean(0).round().astype(int).tolist()))


def painted(image: Image.Image, where: Mask, color: tuple[int, ...]) -> Image.Image:
    refuse_other_size(image, where)
    pixels = np.array(image.convert("RGB"))
    pixels[where] = color
    return Image.fromarray(pixels)


def refuse_other_size(image: Image.Image, mask: Mask) -> None:
    if mask.shape != (image.height, image.width):
        raise ValueError(f"a mask of {mask.shape[1]}x{mask.shape[0]} for a picture of {image.width}x{image.height}")


class MaskedSimilarity(SubjectSimilarity):
    """SubjectSimilarity of subjects cut out of their pictures, generated and real alike.

    NaN for a picture in which no subject was found; real pictures in which none was found are not compared to.
    """

    def __init__(self, encoder: ImageTextEncoder, background: str = "white"):
        super().__init__(encoder)
        self.background = background

    def update(  # type: ignore[override]
        self, images: Sequence[Image.Image], masks: Sequence[Mask], real: Sequence[Image.Image], real_masks: Sequence[Mask]
    ) -> None:
        found = [subject_alone(image, mask, self.background) for image, mask in zip(images, masks, strict=True) if mask.any()]
        others = [subject_alone(image, mask, self.background) for image, mask in zip(real, real_masks, strict=True) if mask.any()]
        values = torch.full((len(images),), torch.nan)
        if found and others:
            cosine = self.encoder.encode_images(found) @ self.encoder.encode_images(others).T
            values[[bool(mask.any()) for mask in masks]] = cosine.mean(1)
        self.add(values)


class BackgroundAlignment(TextAlignment):
    """TextAlignment of the prompt with what is around the subject. NaN where the subject fills the picture, or none was found.

    The prompt keeps its subject's name, so values lie below CLIP-T's: they are for comparing methods, not for reading alone.
    """

    def update(self, images: Sequence[Image.Image], masks: Sequence[Mask], prompts: Sequence[str]) -> None:  # type: ignore[override]
        partial = [bool(mask.any() and not mask.all()) for mask in masks]
        rest = [background_alone(image, mask) for image, mask, seen in zip(images, masks, partial, strict=True) if seen]
        values = torch.full((len(images),), torch.nan)
        if rest:
            values[partial] = self.cosines(rest, [prompt for prompt, seen in zip(prompts, partial, strict=True) if seen])
        self.add(values)
