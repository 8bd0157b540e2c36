"""An evaluation laid out: every picture it asks for, where it goes and the settings that its stamp must hold."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datamodules.dreambooth import DreamBooth, Subject
from evaluation.config import EvalConfig
from evaluation.methods import Method, Models, Reference
from evaluation.protocols import Protocol
from evaluation.stamps import is_current
from evaluation.tasks import PictureTask, chosen_subjects, references_of, tasks_of


@dataclass(frozen=True)
class Planned:
    """A picture to be made by a method."""

    task: PictureTask
    reference: Reference
    path: Path
    settings: dict[str, Any]

    @property
    def is_done(self) -> bool:
        return is_current(self.path, self.settings)


@dataclass
class Evaluation:
    """A config with what it names opened: protocol, data, models and the subjects to be evaluated."""

    config: EvalConfig
    protocol: Protocol
    data: DreamBooth
    models: Models
    subjects: list[Subject] = field(init=False)

    def __post_init__(self):
        self.subjects = chosen_subjects(self.protocol, self.data)

    @classmethod
    def open(cls, config: EvalConfig, device: str = "cpu") -> "Evaluation":
        return cls(config, config.resolved_protocol(), DreamBooth(config.data), config.models(device))

    def reference(self, subject: Subject, index: int) -> Reference:
        masks = subject.masks if self.protocol.sampler.masks == "dataset" else None
        return Reference(subject.images[index], masks[index] if masks else None)

    def planned(self, name: str, method: Method, subjects: Iterable[Subject] | None = None) -> list[Planned]:
        """A method's pictures, subject by subject and reference by reference."""
        shared = {"sampler": asdict(self.protocol.sampler), "method": method.options(), "weights": method.weights(self.models)}
        chosen = list(self.subjects if subjects is None else subjects)
        method.require_references({subject.name: len(references_of(self.protocol, subject)) for subject in chosen})
        plans = []
        for subject in chosen:
            for task in tasks_of(self.protocol, self.data, subject):
                reference = self.reference(subject, task.reference)
                settings = shared | {"task": asdict(task), "input": self._input(method, subject, reference)}
                plans.append(Planned(task, reference, self.config.pictures / name / task.file, settings))
        return plans

    def _input(self, method: Method, subject: Subject, reference: Reference) -> dict[str, Any] | None:
        """Digests of the reference picture and its mask, for methods that look at them, and of other pictures they look at."""
        if not method.uses_reference:
            return None
        mask = str(reference.mask_path) if reference.mask_path else None
        digests: dict[str, Any] = {"image": self.models.digest(str(reference.path)), "mask": self.models.digest(mask)}
        others = {path.name: self.models.digest(str(path)) for path in method.also_reads(subject)}
        return digests | {"others": others} if others else digests
