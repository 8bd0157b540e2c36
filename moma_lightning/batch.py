"""The typed batch: what shards become and what both training stages eat."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

#: Features of this name are as long as the subject: a shorter one of a batch is filled up with zeros.
OF_THE_SUBJECT = "of_the_subject."


@dataclass
class TripletBatch:
    """Image / caption / mask triplets (paper section 4.1).

    pixel_values: the whole reference picture I_ref, in [-1, 1].
    subject_mask: M_ref, 1 on the subject and 0 elsewhere.
    caption: P_ref, without colour, shape and texture words; contains the label.
    label: the subject word(s), e.g. "cat" or "toy robot".
    key: the sample's key in its shard.
    full_caption: the caption before those words were taken out, where the shards keep it; else the caption.
    repeated: its samples were validated before, and count no more (`counted`): a rank whose part is short goes on with batches that were given.
    """

    pixel_values: Float[Tensor, "batch 3 height width"]
    subject_mask: Float[Tensor, "batch 1 height width"]
    caption: list[str]
    label: list[str]
    key: list[str]
    full_caption: list[str] = field(default_factory=list)
    repeated: bool = False

    def __post_init__(self) -> None:
        self.full_caption = self.full_caption or self.caption

    def __len__(self) -> int:
        return len(self.key)


@dataclass
class CachedBatch:
    """Triplets whose frozen models have run before: in the picture's place stands what they made of it (`datamodules/caches`).

    features: by name, [batch, ...] each: what the stage's own `features` gave when the cache was made (`OF_THE_SUBJECT`: its beginning).
    The other fields are TripletBatch's.
    """

    features: dict[str, Tensor]
    subject_mask: Float[Tensor, "batch 1 height width"]
    caption: list[str]
    label: list[str]
    key: list[str]
    full_caption: list[str]
    repeated: bool = False

    def __len__(self) -> int:
        return len(self.key)

    def without_reference(self) -> "CachedBatch":
        return replace(self, features={name: feature for name, feature in self.features.items() if not name.startswith(OF_THE_SUBJECT)})


def counted(batch: TripletBatch | CachedBatch) -> int:
    """How many of a batch's samples a mean over the whole validation counts."""
    return 0 if batch.repeated else len(batch)


def white_background(
    pixel_values: Float[Tensor, "batch 3 height width"], subject_mask: Float[Tensor, "batch 1 height width"]
) -> Float[Tensor, "batch 3 height width"]:
    """I_wb: the subject on white (1.0). The paper prints I_ref * M_ref; its figures and released code show white."""
    return torch.where(subject_mask > 0.5, pixel_values, torch.ones_like(pixel_values))
