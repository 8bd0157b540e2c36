"""What the scores have in common: one value a picture, gathered over processes, then a mean."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from evaluation.metrics.encoders import ImageTextEncoder


class PerPicture(Metric):
    """One value a picture; the metric is the mean over pictures. A picture for which the score is not defined holds NaN."""

    full_state_update = False
    higher_is_better = True
    values: list[Tensor] | Tensor

    def __init__(self, encoder: ImageTextEncoder):
        super().__init__()
        self.encoder = encoder
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def of(self, *given: Any) -> list[float]:
        """Values of the pictures of one `update`."""
        self.update(*given)
        return self.per_picture().tolist()

    def add(self, values: Float[Tensor, " pictures"]) -> None:
        self.values.append(values.to(self.device))

    def per_picture(self) -> Float[Tensor, " pictures"]:
        """One value a picture, in the order they were given."""
        return dim_zero_cat(self.values) if len(self.values) else torch.zeros(0)

    def compute(self) -> Float[Tensor, ""]:
        """The mean over the pictures that have a value. Raises ValueError without a picture."""
        values = self.per_picture()
        if not len(values):
            raise ValueError("no picture was given to the metric")
        return values.nanmean()
