"""Text alignment: how close a generated picture is to its prompt (CLIP-T, paper section 4)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from evaluation.metrics.encoders import ImageTextEncoder


class TextAlignment(Metric):
    """Plain cosine of a picture and its prompt, the mean over pictures.

    template: what CLIP reads, with `{prompt}` in it ("A photo depicts {prompt}" in CLIPScore).
    scale: 1 here and in DreamBooth; CLIPScore has 2.5, torchmetrics 100.
    """

    full_state_update = False
    higher_is_better = True
    values: list[Tensor] | Tensor

    def __init__(self, encoder: ImageTextEncoder, template: str = "{prompt}", scale: float = 1.0):
        super().__init__()
        self.encoder, self.template, self.scale = encoder, template, scale
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures but {len(prompts)} prompts")
        texts = self.encoder.encode_texts([self.template.format(prompt=prompt) for prompt in prompts])
        cosine = (self.encoder.encode_images(images) * texts).sum(1)
        self.values.append(self.scale * cosine.to(self.device))  # type: ignore[union-attr]

    def per_picture(self) -> Float[Tensor, " pictures"]:
        """One value a picture, in the order they were given."""
        return dim_zero_cat(self.values) if len(self.values) else torch.zeros(0)

    def compute(self) -> Float[Tensor, ""]:
        values = self.per_picture()
        if not len(values):
            raise ValueError("no picture was given to the metric")
        return values.mean()
