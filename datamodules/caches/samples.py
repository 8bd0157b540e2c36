"""A cached sample: `<key>.safetensors` with every feature as [views, ...], `<key>.mask.png` and `<key>.json`.

Of a feature that is as long as the subject (`OF_THE_SUBJECT`, [views, positions, channels]) the zeros at its end are not kept.
"""

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules import pictures
from datamodules.samples import BadSampleError, Triplet, to_subject_mask
from datamodules.squares import as_bytes
from moma_lightning.batch import OF_THE_SUBJECT, CachedBatch

FEATURES = "safetensors"


@dataclass
class CachedTriplet:
    """One view of a cached sample; see `moma_lightning.batch.CachedBatch`."""

    features: dict[str, Tensor]
    subject_mask: Float[Tensor, "1 height width"]
    caption: str
    label: str
    key: str
    full_caption: str


def encode(triplet: Triplet, features: dict[str, Tensor]) -> dict[str, Any]:
    """A webdataset sample of the unmirrored `triplet` and its features, [views, ...] each."""
    mask = io.BytesIO()
    Image.fromarray(triplet.subject_mask[0].mul(255).byte().numpy()).save(mask, "PNG")
    texts = {"caption": triplet.caption, "label": triplet.label, "caption_full": triplet.full_caption}
    content = safetensors.torch.save({name: trimmed(name, feature).contiguous() for name, feature in features.items()})
    text = json.dumps(texts, ensure_ascii=False, sort_keys=True).encode()
    return {"__key__": triplet.key, FEATURES: content, "mask.png": mask.getvalue(), "json": text}


def trimmed(name: str, feature: Float[Tensor, "views ..."]) -> Float[Tensor, "views ..."]:
    """What is as long as the subject, up to the last position that is not zero in all views; other features as they are."""
    if not name.startswith(OF_THE_SUBJECT):
        return feature
    filled = feature.any(-1).any(0).nonzero()
    return feature[:, : int(filled[-1]) + 1 if len(filled) else 0]


def stacked(name: str, features: list[Tensor]) -> Float[Tensor, "batch ..."]:
    """Of one batch; what is as long as the subject is filled up with zeros to the longest."""
    return pad_sequence(features, batch_first=True) if name.startswith(OF_THE_SUBJECT) else torch.stack(features)


def decode(sample: dict[str, Any], rng: np.random.Generator | None = None, flip: bool = False) -> CachedTriplet:
    """One view: the mirrored one for the same `rng` that mirrors a square picture (`datamodules.samples.decode`).

    Raises BadSampleError with the bare reason.
    """
    try:
        features = safetensors.torch.load(sample[FEATURES])
        mask = to_subject_mask(as_bytes(pictures.open_mask(sample["mask.png"])))
        texts = json.loads(sample["json"])
        view = int(flip and rng is not None and rng.random() < 0.5)
        features = {name: feature[view] for name, feature in features.items()}
        caption, label, full_caption = texts["caption"], texts["label"], texts["caption_full"]
    except (KeyError, IndexError, ValueError, SafetensorError, *pictures.PICTURE_ERRORS) as error:
        raise BadSampleError(f"cached sample cannot be read: {error!r}") from error
    return CachedTriplet(features, mask.flip(-1) if view else mask, caption, label, sample["__key__"], full_caption)


def collate(triplets: list[CachedTriplet]) -> CachedBatch:
    return CachedBatch(
        features={name: stacked(name, [t.features[name] for t in triplets]) for name in triplets[0].features},
        subject_mask=torch.stack([t.subject_mask for t in triplets]),
        caption=[t.caption for t in triplets],
        label=[t.label for t in triplets],
        key=[t.key for t in triplets],
        full_caption=[t.full_caption for t in triplets],
    )
