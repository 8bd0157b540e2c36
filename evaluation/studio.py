"""Pictures of MoMA's that no table scores, for figures and for measuring M_gen: stamped, so that a second call makes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.dreambooth import Subject
from evaluation.methods import Moma
from evaluation.plan import Evaluation, Planned
from evaluation.stamps import git_revision, is_current, write_picture
from evaluation.tasks import picture_seed

#: Of the masks, in Figure 9 and where M_gen is measured (the paper's Table 3).
STRENGTHS = (1.0, 0.5, 0.0)


class Recording:
    """A pipeline that is also asked for M_gen and keeps the last step's: float [batch, 1, h, w] in 0..1."""

    def __init__(self, pipeline: Any):
        self.pipeline, self.masks = pipeline, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def __call__(self, *args: Any, **given: Any) -> Any:
        output = self.pipeline(*args, **given, return_masks=True)
        self.masks = output.masks[-1]
        return output


@dataclass
class Studio:
    """Makes MoMA's pictures below `folder`, where they are not there yet."""

    evaluation: Evaluation
    folder: Path

    def plans(self, name: str, method: Moma, subject: Subject) -> list[Planned]:
        """One picture of each of the subject's prompts, of its first reference."""
        planned = self.evaluation.planned(name, method, [subject])
        first = [plan for plan in planned if plan.task.picture == 0 and plan.task.reference == planned[0].task.reference]
        return [replace(plan, path=self.folder / name / plan.task.file) for plan in first]

    def plan(self, name: str, method: Moma, subject: Subject, picture: int = 0) -> Planned:
        """The subject's first prompt, of the protocol's first kind, from its noise number `picture`."""
        first = self.plans(name, method, subject)[0]
        task = first.task
        seed = picture_seed(self.evaluation.protocol.sampler.seed, task.subject, task.kind, task.prompt_index, picture)
        task = replace(task, picture=picture, seed=seed)
        settings = first.settings | {"task": vars(task)}
        return replace(first, task=task, path=self.folder / name / task.file, settings=settings)

    def make(self, method: Moma, subject: Subject, plans: Sequence[Planned], with_masks: bool = False) -> None:
        """Make what is missing, each picture with its M_gen(0) beside it if asked for."""
        missing = [plan for plan in plans if not self.is_done(plan, with_masks)]
        if not missing:
            return
        method.setup(self.evaluation.models, self.evaluation.protocol.sampler)
        if with_masks:
            method.pipeline = Recording(method.pipeline)
        provenance = {"protocol": self.evaluation.protocol.name, "git_revision": git_revision()}
        size = self.evaluation.config.batch_size
        for batch in (missing[start : start + size] for start in range(0, len(missing), size)):
            images = method.generate(subject, batch[0].reference, [plan.task for plan in batch])
            for i, (plan, image) in enumerate(zip(batch, images, strict=True)):
                write_picture(plan.path, image, plan.settings, provenance)
                if with_masks:
                    write_picture(mask_path(plan.path), as_picture(method.pipeline.masks[i, 0]), plan.settings, provenance)

    @staticmethod
    def is_done(plan: Planned, with_masks: bool) -> bool:
        return plan.is_done and (not with_masks or is_current(mask_path(plan.path), plan.settings))


def mask_path(picture: Path) -> Path:
    return picture.with_name(f"{picture.stem}-mask.png")


def as_picture(mask: Any) -> Image.Image:
    """A mask in 0..1 [h, w] as grey levels."""
    return Image.fromarray((mask.float().clamp(0, 1) * 255).round().byte().cpu().numpy().astype(np.uint8))
