"""DINO, CLIP-I and CLIP-T as torchmetrics classes behind one encoder interface."""

from evaluation.metrics.encoders import (
    CachedEncoder,
    ClipConfig,
    ClipEncoder,
    DinoConfig,
    DinoEncoder,
    ImageTextEncoder,
    build_encoders,
)
from evaluation.metrics.subject_fidelity import SubjectSimilarity
from evaluation.metrics.text_alignment import TextAlignment

__all__ = [
    "CachedEncoder",
    "ClipConfig",
    "ClipEncoder",
    "DinoConfig",
    "DinoEncoder",
    "ImageTextEncoder",
    "SubjectSimilarity",
    "TextAlignment",
    "build_encoders",
]
