"""Scores as torchmetrics classes behind one encoder interface: DINO, CLIP-I and CLIP-T, and more that are optional."""

from evaluation.metrics.cache import CachedEncoder, build_encoders
from evaluation.metrics.configs import ClipConfig, DinoConfig, DreamsimConfig, EncoderConfig, SiglipConfig
from evaluation.metrics.copying import CopyPaste, SeedDiversity
from evaluation.metrics.encoders import ClipEncoder, DinoEncoder, DreamsimEncoder, ImageTextEncoder, SiglipEncoder
from evaluation.metrics.masked import BackgroundAlignment, MaskedSimilarity
from evaluation.metrics.masker import Masker
from evaluation.metrics.subject_fidelity import SubjectSimilarity
from evaluation.metrics.text_alignment import TextAlignment

__all__ = [
    "BackgroundAlignment",
    "CachedEncoder",
    "ClipConfig",
    "ClipEncoder",
    "CopyPaste",
    "DinoConfig",
    "DinoEncoder",
    "DreamsimConfig",
    "DreamsimEncoder",
    "EncoderConfig",
    "ImageTextEncoder",
    "MaskedSimilarity",
    "Masker",
    "SeedDiversity",
    "SiglipConfig",
    "SiglipEncoder",
    "SubjectSimilarity",
    "TextAlignment",
    "build_encoders",
]
