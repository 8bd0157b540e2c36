"""What can be evaluated: one small interface."""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import diffusers
from PIL import Image

from datamodules.dreambooth import Subject, load_mask, load_picture
from evaluation.protocols import Sampler
from evaluation.tasks import PictureTask
from moma_lightning.digests import identity
from moma_lightning.foundation import Dtype, FoundationConfig, unsaid
from moma_lightning.pipeline import MoMAPipeline, load_pipeline
from moma_lightning.single_file import is_lora, is_single_file


@dataclass(frozen=True)
class Reference:
    """The input picture of a subject, and its mask where the data has one."""

    path: Path
    mask_path: Path | None = None

    @property
    def image(self) -> Image.Image:
        return load_picture(self.path)

    @property
    def mask(self) -> Image.Image | None:
        """0 and 255; None where the data has none."""
        return load_mask(self.mask_path) if self.mask_path else None


@dataclass
class Models:
    """The weights under evaluation. Holds one pipeline at a time, on whichever base: methods are run one after another.

    held: that pipeline and its own scheduler, by all that loading it depends on. dtype: of the project's own pipeline's weights while it draws.
    """

    foundation: FoundationConfig
    adapter: str | None = None
    decoder: str | None = None
    device: str = "cpu"
    dtype: Dtype = "float32"
    held: dict[Any, tuple[Any, Any]] = field(default_factory=dict, repr=False)
    digests: dict[str, str] = field(default_factory=dict)

    def pipeline(self, adapter: str | None, decoder: str | None) -> MoMAPipeline:
        key = (self.foundation.base, self.foundation.base_config, adapter, decoder)
        return self.hold(key, lambda: load_pipeline(self.foundation, adapter, decoder, self.dtype))

    def hold(self, key: Any, load: Callable[[], Any]) -> Any:
        """The pipeline that `load` makes, on the device, with its own scheduler; kept while the next one asked for has the same key."""
        if key not in self.held:
            self.held.clear()  # frees the old one before the new one is read
            pipeline = load().to(self.device)
            self.held[key] = pipeline, getattr(pipeline, "scheduler", None)
        pipeline, scheduler = self.held[key]
        if scheduler is not None:
            pipeline.scheduler = scheduler  # the method before may have put another one there
        return pipeline

    def on_base(self, base: str | None) -> "Models":
        """The same adapters on another fine-tune of the base model, None for the foundation's own.

        A single file brings no configs and takes those of the base in whose place it stands; a LoRA is added to that base. Raises ValueError for a
        LoRA where that base is one file: diffusers adds it to a folder's weights.
        """
        if base is None:
            return self
        own = self.foundation
        configs = own.base_config if is_single_file(own.base) else own.base
        if is_lora(base) and is_single_file(own.base) and not is_lora(own.base):
            raise ValueError(f"{base} is a LoRA, and {own.base} is one file: save that model as a diffusers folder, for the LoRA to be added to it")
        return replace(self, foundation=replace(own, base=base, base_config=configs))

    def digest(self, path_or_id: str | None) -> str | None:
        """`identity`, found once. Raises FileNotFoundError for a missing path."""
        if path_or_id is None:
            return None
        if path_or_id not in self.digests:
            self.digests[path_or_id] = identity(path_or_id)
        return self.digests[path_or_id]


class Method(ABC):
    """Makes pictures of a subject. Subclasses are dataclasses whose fields are the method's options.

    is_oracle: stands for the real pictures themselves, nothing is generated. uses_reference: what it makes depends on the input.
    folder: where a method may keep what it makes once a subject (trained weights), set before `setup`; None: nowhere.
    """

    is_oracle: ClassVar[bool] = False
    uses_reference: ClassVar[bool] = True
    folder: Path | None = None
    pipeline: Any = None  # diffusers declares a pipeline's parts at run time only

    def options(self) -> dict[str, Any]:
        """What a picture's stamp says of its method: the class, of one that is not this package's its source too, and the fields.

        Raises ValueError for a class that is no dataclass.
        """
        if not is_dataclass(type(self)):
            raise ValueError(f"{type(self).__name__}: a method is a dataclass, its fields are its options: put @dataclass before the class")
        kind = type(self).__name__
        if not type(self).__module__.startswith("evaluation.methods."):
            module = type(self).__module__.replace("__mp_main__", "__main__")  # of a script's class in a process that it has started
            kind = f"{module}.{type(self).__qualname__} {source_digest(type(self))}"
        return {"kind": kind, **asdict(self)}  # type: ignore[call-overload]

    def require(self, models: Models) -> None:  # noqa: B027 - not every method has conditions
        """Raises ValueError for models that the method cannot work with; asked of all methods before the first one draws."""

    def require_references(self, counts: Mapping[str, int]) -> None:  # noqa: B027 - as above
        """Raises ValueError where a method cannot tell a subject's input pictures apart. counts: how many of them each subject is drawn from."""

    def weights(self, models: Models) -> dict[str, str | None]:
        """Digests of everything read from disk that the pictures depend on."""
        return {}

    def also_reads(self, subject: Subject) -> list[Path]:
        """Pictures of the subject, besides the input, that the result depends on."""
        return []

    def setup(self, models: Models, sampler: Sampler) -> None:  # noqa: B027 - not every method has something to load
        """Load what is needed; called once before `generate`."""

    def teardown(self) -> None:
        """Let go of what `setup` loaded, so that the next method finds the memory free."""
        self.pipeline = None

    @abstractmethod
    def generate(self, subject: Subject, reference: Reference, tasks: list[PictureTask]) -> list[Image.Image]:
        """One picture a task, its initial noise drawn on the CPU from the task's seed."""


def source_digest(kind: type) -> str:
    """Eight digits that change with the class's own lines; "" where they cannot be read."""
    try:
        return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()[:8]
    except (OSError, TypeError):
        return ""


def use_scheduler(pipeline: Any, sampler: Sampler) -> None:
    """Give the pipeline the protocol's scheduler, configured by its own, where that leaves something out as Stable Diffusion's; of None its base's own.

    Raises ValueError for a name that diffusers lacks, and for a pipeline of another formulation (flow matching, EDM), which no such scheduler fits.
    """
    if sampler.scheduler is None:
        pipeline.scheduler = getattr(pipeline, "own_scheduler", None) or pipeline.scheduler  # MoMA's comes with DDIM
        return
    scheduler = getattr(diffusers, sampler.scheduler, None)
    if scheduler is None:
        raise ValueError(f"diffusers has no scheduler {sampler.scheduler!r}")
    own = pipeline.scheduler
    if not hasattr(own, "alphas_cumprod"):
        raise ValueError(f"{type(own).__name__} has no diffusion's noise schedule, which {sampler.scheduler} needs: set own_scheduler: true to keep it")
    pipeline.scheduler = scheduler.from_config(own.config, **unsaid(own.config))
