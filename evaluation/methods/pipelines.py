"""Other diffusers pipelines as methods, by their class path."""

import inspect
import pkgutil
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from datamodules.dreambooth import Subject
from evaluation.methods.base import Method, Models, Reference, use_scheduler
from evaluation.protocols import Sampler
from evaluation.tasks import PictureTask
from moma_lightning.hub import resolve

Source = Literal["prompt", "label", "image", "mask"]


@dataclass
class Pipeline(Method):
    """Any diffusers pipeline, from its own folder or hub id, called with the protocol's noise and sampler settings.

    pipeline_class: its class path. pretrained: folder or `<hub id>@<revision>`. arguments: argument of its call -> what it is given:
    "prompt" and "label" (a list, one a picture), "image" and "mask" (of the reference; one for all). kwargs: further arguments of the call.
    load_kwargs: of `from_pretrained`. own_scheduler: keep the pipeline's, for models that a diffusion scheduler does not fit.
    batched: False calls it picture by picture, for pipelines that take one prompt.

    Guidance, steps, size and noise are the protocol's wherever the call takes them under diffusers' names, unless `kwargs` says otherwise.
    """

    pretrained: str
    pipeline_class: str = "diffusers.DiffusionPipeline"
    arguments: dict[str, Source] = field(default_factory=lambda: {"prompt": "prompt"})
    kwargs: dict[str, Any] = field(default_factory=dict)
    load_kwargs: dict[str, Any] = field(default_factory=dict)
    own_scheduler: bool = False
    batched: bool = True

    def weights(self, models: Models) -> dict[str, str | None]:
        return {"pipeline": models.digest(self.pretrained)}

    def kind(self) -> Any:
        try:
            return pkgutil.resolve_name(self.pipeline_class)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"Pipeline: there is no class {self.pipeline_class!r} ({error})") from error

    def require(self, models: Models) -> None:
        """What a DiffusionPipeline takes is known once it is loaded: its folder names the class."""
        if (kind := self.kind()) is not DiffusionPipeline:
            self.check_arguments(kind)

    def check_arguments(self, kind: type) -> None:
        self.taken = inspect.signature(kind.__call__).parameters
        if unknown := set(self.arguments | self.kwargs) - set(self.taken):
            raise ValueError(f"{self.pipeline_class} takes no argument {', '.join(sorted(unknown))}; it takes {', '.join(self.taken)}")

    def load(self) -> Any:
        """The pipeline, in float32 where `load_kwargs` does not say otherwise."""
        return self.kind().from_pretrained(**resolve(self.pretrained), **({"torch_dtype": torch.float32} | self.load_kwargs))

    def setup(self, models: Models, sampler: Sampler) -> None:
        self.sampler = sampler
        self.pipeline = models.hold((self.pretrained, self.pipeline_class, repr(self.load_kwargs)), self.load)
        self.pipeline.set_progress_bar_config(disable=True)
        self.check_arguments(type(self.pipeline))
        if not self.own_scheduler:
            use_scheduler(self.pipeline, sampler)

    def generate(self, subject: Subject, reference: Reference, tasks: list[PictureTask]) -> list[Image.Image]:
        groups = [tasks] if self.batched else [[task] for task in tasks]
        return [image for group in groups for image in self.drawn(reference, group)]

    def drawn(self, reference: Reference, tasks: list[PictureTask]) -> list[Image.Image]:
        """Raises ValueError where the pipeline's safety checker has made a picture black, which is none of the method's."""
        output = self.pipeline(**self.call_arguments(reference, tasks))
        if hidden := sum(getattr(output, "nsfw_content_detected", None) or []):
            raise ValueError(f"{self.pipeline_class}: its safety checker has hidden {hidden} of {len(tasks)} pictures of {tasks[0].subject}: load it with "
                             "load_kwargs: {safety_checker: null}")
        return output.images

    def call_arguments(self, reference: Reference, tasks: list[PictureTask]) -> dict[str, Any]:
        prompts = [self.sampler.prompt_template.format(prompt=task.prompt, label=task.label) for task in tasks]
        labels = [task.label for task in tasks]
        one = slice(None) if self.batched else 0
        if "mask" in self.arguments.values() and reference.mask_path is None:
            raise ValueError(f"{self.pipeline_class} wants the mask of {reference.path}, which has none: the data needs masks, the sampler `masks: dataset`")
        given = {"prompt": lambda: prompts[one], "label": lambda: labels[one], "image": lambda: reference.image, "mask": lambda: reference.mask}
        sampler = self.sampler
        settings = {
            "generator": [torch.Generator("cpu").manual_seed(task.seed) for task in tasks],
            "guidance_scale": sampler.guidance_scale,
            "num_inference_steps": sampler.num_inference_steps,
            "height": sampler.height,
            "width": sampler.width,
        }
        said = {name: value for name, value in settings.items() if name in self.taken and value is not None}
        return said | {name: given[what]() for name, what in self.arguments.items()} | self.kwargs
