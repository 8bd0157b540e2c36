"""MoMA's stage 1 alone, in front of an IP-Adapter as others trained it."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from datamodules.dreambooth import Subject
from evaluation.methods.base import Models, Reference
from evaluation.methods.diffusion import IpAdapter
from evaluation.tasks import PictureTask


@dataclass
class StockIpAdapter(IpAdapter):
    """Stage 1 alone: its predicted embedding of the target picture goes into a stock IP-Adapter; no subject attention, no masking.

    What IpAdapter's CLIP embedding of the reference cannot do, follow the prompt, is what stage 1 was trained for (Eq. 4).
    adapter, scale: as IpAdapter's. decoder: stage 1's folder, None for the config's.
    """

    decoder: str | None = None

    def checkpoints(self, models: Models) -> tuple[str | None, str | None]:
        decoder = self.decoder or models.decoder
        if decoder is None:
            raise ValueError("StockIpAdapter needs `decoder` (stage 1's image_feature_decoder folder) in the config")
        return super().checkpoints(models)[0], decoder

    def weights(self, models: Models) -> dict[str, str | None]:
        return super().weights(models) | {"sam": models.digest(models.foundation.sam)}

    def conditions(self, subject: Subject, reference: Reference) -> dict[str, Any]:
        return {"beta": 0.0, "context_scale": self.scale}

    def generate(self, subject: Subject, reference: Reference, tasks: list[PictureTask]) -> list[Image.Image]:
        return self.draw(subject, reference, tasks, image_embeds=self.predicted(subject, reference, tasks))

    @torch.no_grad()
    def predicted(self, subject: Subject, reference: Reference, tasks: list[PictureTask]) -> Float[Tensor, "tasks dim"]:
        """Stage 1's embedding for each prompt."""
        return self.pipeline.context_embeds(self.prepared(subject, reference), [task.prompt for task in tasks])
