"""Methods that are trained on each subject before they draw it: what they share."""

import hashlib
import json
import logging
import time
from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from datamodules.dreambooth import Subject, load_picture
from evaluation.methods.base import Models, Reference
from evaluation.methods.diffusion import DiffusionMethod
from evaluation.protocols import Sampler
from evaluation.tasks import PictureTask
from moma_lightning.digests import content_digest
from moma_lightning.files import write_beside
from moma_lightning.losses import denoising_target, noise_prediction_losses
from moma_lightning.models.latents import scaled
from moma_lightning.subject import to_pixels

logger = logging.getLogger(__name__)
Weights = dict[str, Tensor]


@dataclass
class TunedMethod(DiffusionMethod):
    """Trains a few parameters of the base model on a subject by noise prediction (Eq. 1), then samples with them.

    What was trained is kept in `<folder>/<subject>/trained-<digest>.safetensors`; the digest covers options, weights and
    pictures, so a killed run trains no subject twice. The base is put back after every call.

    pictures: trains on the protocol's reference alone, the one picture that every other method gets, or on all of the
    subject's, as the published baselines did: scores of the two kinds do not compare, and "all" has seen the pictures it is
    scored against. steps, learning_rate, batch_size: AdamW's, at a constant rate. seed: of noise and timesteps.
    """

    pictures: Literal["reference", "all"] = "reference"
    steps: int = 500
    learning_rate: float = 1e-4
    batch_size: int = 1
    seed: int = 0

    @abstractmethod
    def tuned(self, label: str, weights: Weights | None = None) -> AbstractContextManager[dict[str, nn.Parameter]]:
        """The pipeline with this method's parameters in it, by name: new ones, or `weights`. The base is put back at the end."""

    @abstractmethod
    def captions(self, label: str, random: np.random.Generator) -> list[str]:
        """`batch_size` texts that stand for the subject's pictures in training."""

    @abstractmethod
    def worded(self, task: PictureTask) -> PictureTask:
        """The task as the trained model must read it."""

    def augmented(self, pictures: list[Image.Image]) -> list[Image.Image]:
        return pictures

    def also_reads(self, subject: Subject) -> list[Path]:
        return subject.images if self.pictures == "all" else []

    def require(self, models: Models) -> None:
        if models.dtype != "float32":
            raise ValueError(f"{type(self).__name__} trains, which needs `dtype: float32`, not {models.dtype}")

    def setup(self, models: Models, sampler: Sampler) -> None:
        self.require(models)
        super().setup(models, sampler)
        self.identity = {"options": self.options(), "weights": self.weights(models), "size": self.size}
        self.held: tuple[str, Weights] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures in training, the protocol's."""
        default = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        return self.sampler.height or default, self.sampler.width or default

    def generate(self, subject: Subject, reference: Reference, tasks: list[PictureTask]) -> list[Image.Image]:
        with self.tuned(subject.label, self.trained(subject, reference)):
            return super().generate(subject, reference, [self.worded(task) for task in tasks])

    def trained(self, subject: Subject, reference: Reference) -> Weights:
        """The subject's weights: held, read, or trained now."""
        paths = subject.images if self.pictures == "all" else [reference.path]
        about = self.identity | {"label": subject.label, "pictures": [content_digest(path) for path in paths]}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        if self.held is None or self.held[0] != digest:
            self.held = digest, self._read_or_fit(subject, paths, f"trained-{digest}.safetensors", about)
        return self.held[1]

    def _read_or_fit(self, subject: Subject, paths: list[Path], name: str, about: dict[str, Any]) -> Weights:
        file = self.folder / subject.name / name if self.folder else None
        if file is not None and file.exists():
            return load_file(file)
        started = time.monotonic()
        weights = self.fit(subject.label, [load_picture(path) for path in paths])
        logger.info("%s: trained %d steps on %s in %.0f s", type(self).__name__, self.steps, subject.name, time.monotonic() - started)
        if file is not None:
            write_beside(file, lambda path: save_file(weights, path, {"settings": json.dumps(about)}))
        return weights

    @torch.enable_grad()
    def fit(self, label: str, pictures: list[Image.Image]) -> Weights:
        """Train on the pictures. Noise, timesteps and texts are drawn on the CPU: the same for a subject wherever it is trained."""
        pipeline, random = self.pipeline, np.random.default_rng(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        moments = encode(pipeline, self.augmented(pictures), self.size)
        with self.tuned(label) as parameters:
            optimizer = torch.optim.AdamW(parameters.values(), lr=self.learning_rate)
            for _ in range(self.steps):
                chosen = torch.from_numpy(random.integers(len(moments), size=self.batch_size))
                loss = noise_prediction_loss(pipeline, moments[chosen], self.captions(label, random), generator)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def encode(pipeline: Any, pictures: list[Image.Image], size: tuple[int, int]) -> Float[Tensor, "pictures moments h w"]:
    """Mean and log-variance of each picture's latents, once: cut to the middle's aspect ratio, resized to (height, width)."""
    fitted = [ImageOps.fit(picture, size[::-1], Image.Resampling.BICUBIC) for picture in pictures]
    pixels = [to_pixels(picture).to(pipeline.device, pipeline.vae.dtype) for picture in fitted]
    return torch.cat([pipeline.vae.encode(one).latent_dist.parameters for one in pixels])


def noise_prediction_loss(
    pipeline: Any, moments: Float[Tensor, "batch moments h w"], captions: list[str], generator: torch.Generator
) -> Float[Tensor, ""]:
    """Eq. 1 over a batch, as diffusers' training scripts compute it: uniform timesteps, latents drawn from the VAE's posterior."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    latents = scaled(pipeline.vae, DiagonalGaussianDistribution(moments).sample(generator))
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator).to(latents.device)
    size = [side * pipeline.vae_scale_factor for side in latents.shape[-2:]]
    text = pipeline.encode_text(captions, size)
    predicted = pipeline.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, **text._asdict()).sample
    return noise_prediction_losses(predicted, denoising_target(scheduler, latents, noise, timesteps)).mean()


def reworded(task: PictureTask, word: str) -> PictureTask:
    """The task with its label, in the prompt once, replaced by `word`. Raises ValueError where the prompt does not name the label."""
    before, found, after = task.prompt.partition(task.label)
    if not found:
        raise ValueError(f"the prompt {task.prompt!r} does not name {task.label!r}, so the trained word has no place in it")
    return replace(task, prompt=before + word + after, label=word)
