"""The work list: which pictures a protocol asks for, and the noise each starts from."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from datamodules.dreambooth import DreamBooth, Subject
from evaluation.protocols import Protocol

PromptKind = Literal["context", "texture", "accessory", "pose", "camera"]


@dataclass(frozen=True)
class PictureTask:
    """One picture to make. `reference` is the position of the input picture among the subject's."""

    subject: str
    label: str
    reference: int
    kind: PromptKind
    prompt_index: int
    prompt: str
    picture: int
    seed: int

    @property
    def file(self) -> Path:
        """Where the picture goes, below its method's folder."""
        return Path(self.subject) / f"ref{self.reference:02d}-{self.kind}{self.prompt_index:02d}-{self.picture}.png"


def picture_seed(seed: int, subject: str, kind: str, prompt_index: int, picture: int) -> int:
    """The seed of a picture's noise: the same for every method and reference, on every machine."""
    name = f"{seed}/{subject}/{kind}/{prompt_index}/{picture}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def choose(prompts: list[str], count: int | None, subject: str) -> list[tuple[int, str]]:
    """`count` of the prompts with their positions: a choice of the subject's own, so that together all prompts are used."""
    numbered = list(enumerate(prompts))
    if count is None or count >= len(prompts):
        return numbered
    ranked = sorted(numbered, key=lambda item: hashlib.sha256(f"{subject}/{item[1]}/{item[0]}".encode()).digest())
    return sorted(ranked[:count])


def chosen_subjects(protocol: Protocol, data: DreamBooth) -> list[Subject]:
    """Raises ValueError where the protocol names a subject that the data does not have, or compares to pictures that a subject does not have."""
    known = {subject.name: subject for subject in data.subjects}
    missing = sorted(set(protocol.subjects or ()) - set(known))
    if missing:
        raise ValueError(f"protocol {protocol.name!r} names subjects that the data does not have: {', '.join(missing)}")
    chosen = [known[name] for name in protocol.subjects or known]
    if protocol.comparison == "others" and (alone := [subject.name for subject in chosen if len(subject.images) == 1]):
        raise ValueError(f"protocol {protocol.name!r} compares to the subject's other pictures, and these have one alone: {', '.join(alone)}")
    return chosen


def references_of(protocol: Protocol, subject: Subject) -> Sequence[int]:
    """Positions of a subject's input pictures. Raises ValueError where a protocol that lists them has none of the subject, one twice or an unknown one."""
    if protocol.references == "every":
        return range(len(subject.images))
    if protocol.references == "first":
        return range(1)
    files = [image.name for image in subject.images]
    listed = [file for name, _, file in (reference.partition("/") for reference in protocol.references) if name == subject.name]
    if not listed or not set(listed) <= set(files) or len(set(listed)) < len(listed):
        told = ", ".join(listed) or "nothing"
        raise ValueError(f"protocol {protocol.name!r} lists as references of {subject.name!r}: {told}; its pictures are {', '.join(files)}")
    return [files.index(file) for file in listed]


def tasks_of(protocol: Protocol, data: DreamBooth, subject: Subject) -> Iterator[PictureTask]:
    """A subject's pictures: reference by reference, kind by kind in the order of PromptKind."""
    references = references_of(protocol, subject)
    prompts: list[tuple[PromptKind, int, str]] = []
    for kind in get_args(PromptKind):
        count = getattr(protocol, f"{kind}_prompts")
        prompts += [(kind, index, prompt) for index, prompt in choose(data.prompts_of(kind, subject), count, subject.name)]
    for reference in references:
        for kind, index, prompt in prompts:
            for picture in range(protocol.pictures_per_prompt):
                seed = picture_seed(protocol.sampler.seed, subject.name, kind, index, picture)
                yield PictureTask(subject.name, subject.label, reference, kind, index, prompt, picture, seed)
