"""Methods that sample with the project's pipeline, from the same noise: MoMA, IP-Adapter, the base model alone."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from datamodules.dreambooth import Subject
from evaluation.methods.base import Method, Models, Reference, use_scheduler
from evaluation.protocols import Sampler
from evaluation.tasks import PictureTask
from moma_lightning.foundation import FoundationConfig
from moma_lightning.single_file import is_single_file
from moma_lightning.subject import to_pixels


class DiffusionMethod(Method):
    """Shared by the methods below: scheduler, sizes, prompts and noise as the protocol's sampler says."""

    sampler: Sampler
    last: tuple[Any, Any] | None = None  # a reference and its label, and what was prepared of them

    def checkpoints(self, models: Models) -> tuple[str | None, str | None]:
        """Adapter and decoder to load."""
        return None, None

    def weights(self, models: Models) -> dict[str, str | None]:
        adapter, decoder = self.checkpoints(models)
        foundation = models.foundation
        configs = foundation.base_config if is_single_file(foundation.base) else None
        used = {"base": foundation.base, "base_config": configs, "vae": foundation.vae, "adapter": adapter, "decoder": decoder}
        if decoder is not None:
            used |= {"mllm": foundation.mllm}
        precision: dict[str, str | None] = {} if models.dtype == "float32" else {"dtype": models.dtype}
        return {name: models.digest(path) for name, path in used.items()} | precision | (mllm_precision(foundation) if decoder is not None else {})

    def setup(self, models: Models, sampler: Sampler) -> None:
        self.sampler, self.pipeline, self.last = sampler, models.pipeline(*self.checkpoints(models)), None
        use_scheduler(self.pipeline, sampler)

    def prepared(self, subject: Subject, reference: Reference) -> Any:
        """The reference's mask, latents and features, made once for all batches of its prompts."""
        if self.last is None or self.last[0] != (reference, subject.label):
            sampler, size = self.sampler, self.pipeline.default_size()
            area = (sampler.height or size) * (sampler.width or size)
            self.last = (reference, subject.label), self.pipeline.prepare_subject(reference.image, reference.mask, subject.label, area)
        return self.last[1]

    def teardown(self) -> None:
        super().teardown()
        self.last = None

    def conditions(self, subject: Subject, reference: Reference) -> dict[str, Any]:
        """What the pipeline is given besides the prompts."""
        return {}

    def generate(self, subject: Subject, reference: Reference, tasks: list[PictureTask]) -> list[Image.Image]:
        return self.draw(subject, reference, tasks)

    def draw(self, subject: Subject, reference: Reference, tasks: list[PictureTask], **options: Any) -> list[Image.Image]:
        """One call of the pipeline. options: its arguments that differ from task to task."""
        sampler = self.sampler
        output = self.pipeline(
            [sampler.prompt_template.format(prompt=task.prompt, label=task.label) for task in tasks],
            generator=[torch.Generator("cpu").manual_seed(task.seed) for task in tasks],
            guidance_scale=sampler.guidance_scale,
            num_inference_steps=sampler.num_inference_steps,
            height=sampler.height,
            width=sampler.width,
            **self.conditions(subject, reference),
            **options,
        )
        return list(output.images)


@dataclass
class TextOnly(DiffusionMethod):
    """The base model with the prompt alone: the floor of subject fidelity."""

    uses_reference = False


@dataclass
class Moma(DiffusionMethod):
    """MoMA. None stands for what the protocol's sampler or the config says.

    beta, mask_strength, mask_threshold, mask_layers, guide_subject, context_scale: as in MoMAPipeline. texture_beta: beta of texture
    prompts, None for the same (the released code advises about 0.4 for them). context: what the context attention is fed with, stage 1's prediction or the
    reference's own CLIP embedding (the MLLM replaced by CLIP). num_inference_steps, guidance_scale, scheduler: instead of the sampler's.
    adapter, decoder: other weights than the config's, for ablations that train. base: another fine-tune of the base model, which takes
    the adapters unmodified (Figure 10).
    """

    beta: float | None = None
    texture_beta: float | None = None
    mask_strength: float | None = None
    mask_threshold: float = 0.2
    mask_layers: list[int] | None = None
    guide_subject: bool = False
    context_scale: float = 1.0
    context: Literal["decoder", "image"] = "decoder"
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    adapter: str | None = None
    decoder: str | None = None
    base: str | None = None
    scheduler: str | None = None

    def checkpoints(self, models: Models) -> tuple[str | None, str | None]:
        adapter, decoder = self.adapter or models.adapter, self.decoder or models.decoder
        if adapter is None or (decoder is None and self.context == "decoder"):
            raise ValueError("MoMA needs `adapter` (stage 2's folder) and `decoder` (stage 1's image_feature_decoder folder) in the config; "
                             "with `context: image` the adapter alone")
        return adapter, decoder

    def weights(self, models: Models) -> dict[str, str | None]:
        used = {"sam": models.digest(models.foundation.sam)}
        if self.context == "image":
            used |= {"image_encoder": models.digest(models.foundation.image_encoder)}
        return super().weights(models.on_base(self.base)) | used

    def setup(self, models: Models, sampler: Sampler) -> None:
        named: dict[str, Any] = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale,
                 "scheduler": self.scheduler, "beta": self.beta, "mask_strength": self.mask_strength}
        super().setup(models.on_base(self.base), replace(sampler, **{key: value for key, value in named.items() if value is not None}))

    def generate(self, subject: Subject, reference: Reference, tasks: list[PictureTask]) -> list[Image.Image]:
        texture = self.sampler.beta if self.texture_beta is None else self.texture_beta
        beta = [texture if task.kind == "texture" else self.sampler.beta for task in tasks]
        return self.draw(subject, reference, tasks, beta=beta, mllm_prompt=[task.prompt for task in tasks])

    def conditions(self, subject: Subject, reference: Reference) -> dict[str, Any]:
        embeds = {"image_embeds": clip_embeds(self.pipeline, reference)} if self.context == "image" else {}
        return embeds | {
            "image": self.prepared(subject, reference),
            "mask_strength": self.sampler.mask_strength,
            "mask_threshold": self.mask_threshold,
            "mask_layers": self.mask_layers,
            "guide_subject": self.guide_subject,
            "context_scale": self.context_scale,
        }


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
        return {"image_embeds": clip_embeds(self.pipeline, reference), "beta": 0.0, "context_scale": self.scale}


def mllm_precision(foundation: FoundationConfig) -> dict[str, str | None]:
    """How the MLLM's weights are held, as far as it is not the default: stamps without these names were made with the default."""
    options = [option for option in fields(FoundationConfig) if option.name in ("mllm_dtype", "mllm_quantization")]
    return {option.name: getattr(foundation, option.name) for option in options if getattr(foundation, option.name) != option.default}


def clip_embeds(pipeline: Any, reference: Reference) -> Float[Tensor, "1 dim"]:
    """CLIP's embedding of the whole reference picture."""
    return pipeline.clip(to_pixels(reference.image).to(pipeline.device))
