"""Methods that sample with the project's pipeline, from the same noise: MoMA, IP-Adapter, the base model alone."""

from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from datamodules.dreambooth import Subject
from evaluation.methods.base import Method, Models, Reference
from evaluation.protocols import Sampler
from evaluation.tasks import PictureTask


class DiffusionMethod(Method):
    """Shared by the methods below: scheduler, sizes, prompts and noise as the protocol's sampler says."""

    pipeline: Any  # a MoMAPipeline; diffusers declares a pipeline's parts at run time only
    sampler: Sampler

    def checkpoints(self, models: Models) -> tuple[str | None, str | None]:
        """Adapter and decoder to load."""
        return None, None

    def weights(self, models: Models) -> dict[str, str | None]:
        adapter, decoder = self.checkpoints(models)
        foundation = models.foundation
        used = {"base": foundation.base, "vae": foundation.vae, "adapter": adapter, "decoder": decoder}
        if decoder is not None:
            used |= {"mllm": foundation.mllm}
        return {name: models.digest(path) for name, path in used.items()}

    def setup(self, models: Models, sampler: Sampler) -> None:
        self.sampler, self.pipeline = sampler, models.pipeline(*self.checkpoints(models))
        if sampler.scheduler is not None:
            scheduler = getattr(diffusers, sampler.scheduler, None)
            if scheduler is None:
                raise ValueError(f"diffusers has no scheduler {sampler.scheduler!r}")
            self.pipeline.scheduler = scheduler.from_config(self.pipeline.scheduler.config)

    def conditions(self, subject: Subject, reference: Reference) -> dict[str, Any]:
        """What the pipeline is given besides the prompts."""
        return {}

    def generate(self, subject: Subject, reference: Reference, tasks: list[PictureTask]) -> list[Image.Image]:
        sampler = self.sampler
        output = self.pipeline(
            [sampler.prompt_template.format(prompt=task.prompt, label=task.label) for task in tasks],
            generator=[torch.Generator("cpu").manual_seed(task.seed) for task in tasks],
            guidance_scale=sampler.guidance_scale,
            num_inference_steps=sampler.num_inference_steps,
            height=sampler.height,
            width=sampler.width,
            **self.conditions(subject, reference),
        )
        return list(output.images)


@dataclass
class TextOnly(DiffusionMethod):
    """The base model with the prompt alone: the floor of subject fidelity."""

    uses_reference = False


@dataclass
class Moma(DiffusionMethod):
    """MoMA. `beta` and `mask_strength`: None for the protocol's. `context_scale`: weight of the context attention."""

    beta: float | None = None
    mask_strength: float | None = None
    context_scale: float = 1.0

    def checkpoints(self, models: Models) -> tuple[str | None, str | None]:
        if models.adapter is None or models.decoder is None:
            raise ValueError(
                "MoMA needs `adapter` (stage 2's folder) and `decoder` (stage 1's image_feature_decoder folder) in the config"
            )
        return models.adapter, models.decoder

    def conditions(self, subject: Subject, reference: Reference) -> dict[str, Any]:
        return {
            "image": reference.image,
            "mask": reference.mask,
            "label": subject.label,
            "beta": self.sampler.beta if self.beta is None else self.beta,
            "mask_strength": self.sampler.mask_strength if self.mask_strength is None else self.mask_strength,
            "context_scale": self.context_scale,
        }

    def weights(self, models: Models) -> dict[str, str | None]:
        return super().weights(models) | {"sam": models.digest(models.foundation.sam)}


@dataclass
class IpAdapter(DiffusionMethod):
    """IP-Adapter: the context attention alone, fed with the CLIP embedding of the whole reference picture.

    adapter: an IP-Adapter file, None for the foundation's. scale: weight of the image tokens.
    """

    adapter: str | None = None
    scale: float = 1.0

    def checkpoints(self, models: Models) -> tuple[str | None, str | None]:
        adapter = self.adapter or models.foundation.ip_adapter
        if adapter is None:
            raise ValueError("IpAdapter needs `foundation.ip_adapter`, or `adapter` among its own options")
        return adapter, None

    def weights(self, models: Models) -> dict[str, str | None]:
        return super().weights(models) | {"image_encoder": models.digest(models.foundation.image_encoder)}

    def conditions(self, subject: Subject, reference: Reference) -> dict[str, Any]:
        encoder = self.pipeline.clip
        embeds = encoder(to_pixels(reference.image).to(self.pipeline.device))
        return {"image_embeds": embeds, "beta": 0.0, "context_scale": self.scale}


def to_pixels(image: Image.Image) -> Float[Tensor, "1 3 height width"]:
    """A picture in [-1, 1]."""
    array = np.array(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1)[None].div(127.5).sub(1)
