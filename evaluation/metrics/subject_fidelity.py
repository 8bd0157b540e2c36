"""Subject fidelity: how close a generated picture is to the subject's real ones (DINO and CLIP-I, paper section 4)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from evaluation.metrics.encoders import ImageTextEncoder


class SubjectSimilarity(Metric):
    """Mean cosine between a generated picture and the real pictures it is compared to; then the mean over pictures.

    DINO or CLIP-I, as the encoder says (DreamBooth, section 4.1). Values are in [-1, 1].
    """

    full_state_update = False
    higher_is_better = True
    values: list[Tensor] | Tensor

    def __init__(self, encoder: ImageTextEncoder):
        super().__init__()
        self.encoder = encoder
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, images: Sequence[Image.Image], real: Sequence[Image.Image]) -> None:
        """`images`: generated pictures of one subject; `real`: every real picture each of them is compared to."""
        if not real:
            raise ValueError("no real picture to compare to: is this a subject with one picture, compared to the others?")
        cosine = self.encoder.encode_images(images) @ self.encoder.encode_images(real).T
        self.values.append(cosine.mean(1).to(self.device))  # type: ignore[union-attr]

    def per_picture(self) -> Float[Tensor, " pictures"]:
        """One value a picture, in the order they were given."""
        return dim_zero_cat(self.values) if len(self.values) else torch.zeros(0)

    def compute(self) -> Float[Tensor, ""]:
        values = self.per_picture()
        if not len(values):
            raise ValueError("no picture was given to the metric")
        return values.mean()
