"""The first thing to look at: do the real pictures score what others have published for them?"""

from collections.abc import Sequence

import pandas as pd

from datamodules.dreambooth import DreamBooth, Subject
from evaluation.metrics import ClipConfig, DinoConfig
from evaluation.protocols import Protocol
from evaluation.statistics import by_subject, mean_of

#: DreamBooth (Ruiz et al.), Table 1, real images: all 30 subjects.
PUBLISHED = {"dino": 0.774, "clip_i": 0.885}
SUBJECTS = 30

#: Half a unit of the last published digit, and room for what the papers leave open: mean over pictures or over subjects, which
#: resampling of large photographs. A wrong crop, model or pooling moves the score by several times this.
TOLERANCE = 0.01


def check_oracle(scores: pd.DataFrame, protocol: Protocol, subjects: int) -> list[str]:
    """A sentence for each published score that the real pictures miss by more than TOLERANCE.

    Nothing where it cannot be checked: other encoders than DreamBooth's (the mini world's), or a part of the subjects.
    """
    real = scores[scores["prompt_kind"] == "real"]
    if subjects != SUBJECTS:
        return []
    found = []
    comparable = {"dino": is_dreambooths(protocol.dino), "clip_i": is_dreambooths(protocol.clip)}
    for method in dict.fromkeys(real["method"]):
        for metric in (name for name, is_comparable in comparable.items() if is_comparable):
            mean = mean_of(by_subject(real, method, metric))
            if abs(mean - PUBLISHED[metric]) > TOLERANCE:
                found.append(
                    f"{method} have {metric} {mean:.3f} where {PUBLISHED[metric]:.3f} is published (more than {TOLERANCE} away): "
                    "data, preprocessing or encoder are not DreamBooth's, so believe no score of this run"
                )
    return found


def incomplete(data: DreamBooth, protocol: Protocol) -> list[str]:
    """A sentence where subjects of the folder's own table have no pictures and the protocol asks for all: the mean is another one then."""
    if protocol.subjects is not None or not data.missing:
        return []
    count = f"{len(data.missing)} of the {len(data.table.classes)} subjects have no pictures in {data.dataset} ({', '.join(data.missing)})"
    return [f"{count}: these means are of the others, comparable with no published score, and what the real pictures score was not checked"]


def single(scores: pd.DataFrame, subjects: Sequence[Subject]) -> list[str]:
    """A sentence where subjects have no other picture that theirs could be compared to: rows of the real pictures are of the other subjects."""
    names = [subject.name for subject in subjects if len(subject.images) == 1]
    if not names or (scores["prompt_kind"] != "real").all():
        return []
    return [f"{len(names)} of {len(subjects)} subjects have one picture, and no part in what the real pictures score ({', '.join(names)})"]


def is_dreambooths(config: DinoConfig | ClipConfig) -> bool:
    """Whether the encoder is the published one, at whatever revision and precision."""
    return config.model.removeprefix("timm/") == type(config)().model
