"""Methods that are other diffusers pipelines: any by its class path, and BLIP-Diffusion."""

import inspect
import pkgutil
import re
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import torch
from PIL import Image

from datamodules.dreambooth import Subject
from evaluation.methods.base import Method, Models, Reference, use_scheduler
from evaluation.protocols import Sampler
from evaluation.tasks import PictureTask
from moma_lightning.hub import local_path, resolve

Source = Literal["prompt", "label", "image", "mask"]


class ForeignPipeline(Method):
    """A pipeline that is loaded from its own folder or hub id, and called with the protocol's noise and sampler settings."""

    sampler: Sampler

    @abstractmethod
    def source(self) -> str:
        """Folder, or `<hub id>@<revision>`."""

    @abstractmethod
    def load(self) -> Any:
        """The pipeline in float32."""

    def loading(self) -> tuple[Any, ...]:
        """All that `load` depends on."""
        return type(self).__name__, self.source()

    def weights(self, models: Models) -> dict[str, str | None]:
        return {"pipeline": models.digest(self.source())}

    def setup(self, models: Models, sampler: Sampler) -> None:
        self.sampler, self.pipeline = sampler, models.hold(self.loading(), self.load)
        self.pipeline.set_progress_bar_config(disable=True)

    def settings(self, tasks: list[PictureTask]) -> dict[str, Any]:
        """The protocol's settings under diffusers' names; sizes only where the protocol has some."""
        sampler = self.sampler
        sizes = {"height": sampler.height, "width": sampler.width}
        return {
            "generator": [torch.Generator("cpu").manual_seed(task.seed) for task in tasks],
            "guidance_scale": sampler.guidance_scale,
            "num_inference_steps": sampler.num_inference_steps,
        } | {name: value for name, value in sizes.items() if value is not None}


@dataclass
class Pipeline(ForeignPipeline):
    """Any diffusers pipeline.

    pipeline_class: its class path. pretrained: folder or `<hub id>@<revision>`. arguments: argument of its call -> what it is given:
    "prompt" and "label" (a list, one a picture), "image" and "mask" (of the reference; one for all). kwargs: further arguments of the call.
    load_kwargs: of `from_pretrained`. own_scheduler: keep the pipeline's, for models that a diffusion scheduler does not fit.
    batched: False calls it picture by picture, for pipelines that take one prompt.

    Guidance, steps, size and noise are the protocol's wherever the call takes them under diffusers' names, unless `kwargs` says otherwise.
    """

    pretrained: str
    pipeline_class: str = "diffusers.DiffusionPipeline"
    arguments: dict[str, Source] = field(default_factory=lambda: {"prompt": "prompt"})  # type: ignore[arg-type]
    kwargs: dict[str, Any] = field(default_factory=dict)
    load_kwargs: dict[str, Any] = field(default_factory=dict)
    own_scheduler: bool = False
    batched: bool = True

    def source(self) -> str:
        return self.pretrained

    def loading(self) -> tuple[Any, ...]:
        return *super().loading(), self.pipeline_class, repr(self.load_kwargs)

    def load(self) -> Any:
        try:
            kind = pkgutil.resolve_name(self.pipeline_class)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"Pipeline: there is no class {self.pipeline_class!r} ({error})") from error
        return kind.from_pretrained(**resolve(self.pretrained), **({"torch_dtype": torch.float32} | self.load_kwargs))

    def setup(self, models: Models, sampler: Sampler) -> None:
        super().setup(models, sampler)
        self.taken = inspect.signature(type(self.pipeline).__call__).parameters
        if unknown := set(self.arguments | self.kwargs) - set(self.taken):
            raise ValueError(f"{self.pipeline_class} takes no argument {', '.join(sorted(unknown))}; it takes {', '.join(self.taken)}")
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
                             "load_kwargs: {safety_checker: null}")  # fmt: skip
        return output.images

    def call_arguments(self, reference: Reference, tasks: list[PictureTask]) -> dict[str, Any]:
        prompts = [self.sampler.prompt_template.format(prompt=task.prompt, label=task.label) for task in tasks]
        labels = [task.label for task in tasks]
        one = slice(None) if self.batched else 0
        if "mask" in self.arguments.values() and reference.mask_path is None:
            raise ValueError(f"{self.pipeline_class} wants the mask of {reference.path}, which has none: the data needs masks, the sampler `masks: dataset`")
        given = {"prompt": lambda: prompts[one], "label": lambda: labels[one], "image": lambda: reference.image, "mask": lambda: reference.mask}
        settings = {name: value for name, value in self.settings(tasks).items() if name in self.taken}
        return settings | {name: given[what]() for name, what in self.arguments.items()} | self.kwargs


@dataclass
class BlipDiffusion(ForeignPipeline):
    """BLIP-Diffusion (Li et al., arXiv 2305.14720) through diffusers' BlipDiffusionPipeline.

    Untested with weights: the hub's could not be reached where this was written, and diffusers keeps the pipeline among its
    deprecated ones. What it is called with is tested against its signature.

    pretrained, revision: folder, or hub id and the revision it is pinned to. negative_prompt: the authors' scripts use one; "" here,
    as for every other method. prompt_strength, prompt_reps: how often the pipeline repeats the prompt, its own defaults.
    """

    pretrained: str = "Salesforce/blipdiffusion"
    revision: str | None = None
    negative_prompt: str = ""
    prompt_strength: float = 1.0
    prompt_reps: int = 20

    def source(self) -> str:
        if self.revision is None and local_path(self.pretrained) is None:
            raise ValueError(f"BlipDiffusion: set `revision` to the commit of {self.pretrained} to use, so that scores can be told apart")
        return f"{self.pretrained}@{self.revision}" if self.revision else self.pretrained

    def load(self) -> Any:
        if not hasattr(diffusers, "BlipDiffusionPipeline"):
            raise ValueError(f"diffusers {diffusers.__version__} has no BlipDiffusionPipeline any more: install an older one")
        return diffusers.BlipDiffusionPipeline.from_pretrained(**resolve(self.source()), torch_dtype=torch.float32)

    def setup(self, models: Models, sampler: Sampler) -> None:
        super().setup(models, sampler)
        use_scheduler(self.pipeline, sampler)

    def generate(self, subject: Subject, reference: Reference, tasks: list[PictureTask]) -> list[Image.Image]:
        """Picture by picture: the pipeline pairs one reference with one prompt."""
        return [self.pipeline(**self.call_arguments(reference, task)).images[0] for task in tasks]

    def call_arguments(self, reference: Reference, task: PictureTask) -> dict[str, Any]:
        return self.settings([task]) | {
            "prompt": [without_label(task)],
            "reference_image": reference.image,
            "source_subject_category": [task.label],
            "target_subject_category": [task.label],
            "neg_prompt": self.negative_prompt,
            "prompt_strength": self.prompt_strength,
            "prompt_reps": self.prompt_reps,
        }


def without_label(task: PictureTask) -> str:
    """The rest of a prompt: the pipeline puts "a <label>" before it ("a cat in the snow" -> "in the snow", "a red cat" -> "red")."""
    rest = task.prompt.replace(task.label, "", 1)
    return " ".join(re.sub(r"^\s*(a|an|the)\s", "", rest, flags=re.IGNORECASE).split())
