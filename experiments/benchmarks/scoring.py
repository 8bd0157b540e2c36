"""Scoring of pictures against the bare forward pass of its encoder on tensors that are ready."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from datamodules.mini import world
from datamodules.mini.render import render
from evaluation.metrics.cache import CachedEncoder
from evaluation.metrics.encoders import DinoConfig, DinoEncoder, load_dino
from evaluation.stamps import load_pictures
from experiments.benchmarks.loading import photograph
from experiments.benchmarks.timing import Case, Run
from experiments.mini.models import MINI

BATCH = 16


def forward_against_scoring(config: DinoConfig, model: torch.nn.Module, pictures: Sequence[Image.Image], device: torch.device) -> tuple[Run, Run]:
    """The model as its library runs it; the scoring side reads PNGs, looks each up in an empty cache, preprocesses, and embeds."""
    encoder, folder = DinoEncoder(config, model).to(device), tempfile.TemporaryDirectory()
    paths = [Path(folder.name) / f"{i}.png" for i in range(BATCH)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    ready = encoder.preprocess(load_pictures(paths, 1)).to(device)

    def scoring(paths: Sequence[Path]) -> None:
        assert folder.name
        CachedEncoder(encoder).encode_images(load_pictures(paths, torch.get_num_threads()))

    return torch.no_grad()(lambda: encoder.model(ready)), lambda: scoring(paths)


def of_vit_small(device: torch.device) -> tuple[Run, Run]:
    model = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0)
    pictures = [photograph(i).crop((0, 0, 768, 768)).resize((512, 512), Image.Resampling.BICUBIC) for i in range(BATCH)]
    return forward_against_scoring(DinoConfig(), model, pictures, device)


def of_mini(device: torch.device) -> tuple[Run, Run]:
    config, rng = DinoConfig(f"{MINI}/dino", resize=64, crop=64), np.random.default_rng(0)
    rendered, _ = render([world.sample_picture(rng, world.identity("train", i, "cat")) for i in range(BATCH)])
    return forward_against_scoring(config, load_dino(config), [Image.fromarray(picture) for picture in rendered], device)


def cases() -> list[Case]:
    return [
        Case("DINO forward / DINO scoring, ViT-S/16", ">= 0.9", f"random weights, {BATCH} PNGs of 512x512", of_vit_small),
        Case("DINO forward / DINO scoring, mini", ">= 0.9", f"{BATCH} PNGs of the mini world's pictures, 64x64", of_mini),
    ]
