"""Scoring of pictures against the bare forward pass of its encoder on tensors that are ready."""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from PIL import Image

from evaluation.metrics.cache import CachedEncoder
from evaluation.metrics.encoders import DinoConfig, DinoEncoder
from evaluation.stamps import load_pictures
from experiments.benchmarks.loading import photograph
from experiments.benchmarks.timing import Case
from moma_lightning.foundation import MINI

BATCH = 16
Run = Callable[[], object]


def forward_against_scoring(config: DinoConfig, model: torch.nn.Module | None, size: int, device: torch.device) -> tuple[Run, Run]:
    """The scoring side reads PNGs, looks each up in an empty cache, preprocesses, and embeds."""
    encoder, folder = DinoEncoder(config, model).to(device), tempfile.TemporaryDirectory()
    paths = [Path(folder.name) / f"{i}.png" for i in range(BATCH)]
    for i, path in enumerate(paths):
        photograph(i).crop((0, 0, 768, 768)).resize((size, size), Image.Resampling.BICUBIC).save(path)
    ready = encoder.preprocess(load_pictures(paths, 1)).to(device)

    def scoring(paths: Sequence[Path]) -> None:
        assert folder.name
        CachedEncoder(encoder).encode_images(load_pictures(paths, torch.get_num_threads()))

    return torch.no_grad()(lambda: encoder.model(ready)), lambda: scoring(paths)


def of_vit_small(device: torch.device) -> tuple[Run, Run]:
    model = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0)
    return forward_against_scoring(DinoConfig(), model, 512, device)


def cases() -> list[Case]:
    mini = functools.partial(forward_against_scoring, DinoConfig(f"{MINI}/dino", resize=64, crop=64), None, 64)
    return [
        Case("DINO forward / DINO scoring, ViT-S/16", ">= 0.9", f"random weights, {BATCH} PNGs of 512x512", of_vit_small),
        Case("DINO forward / DINO scoring, mini", ">= 0.9", f"{BATCH} PNGs of 64x64", mini),
    ]
