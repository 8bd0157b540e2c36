"""Training steps of the mini world: stage 2 against an IP-Adapter's and against itself from a cache, stage 1 against the bare MLLM."""

import functools
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.mini import world
from datamodules.mini.render import render
from datamodules.samples import to_pixel_values, to_subject_mask
from experiments.benchmarks.timing import Case
from moma_lightning.batch import CachedBatch, TripletBatch, white_background
from moma_lightning.foundation import MINI, FoundationConfig
from moma_lightning.models.image_feature_decoder import DecoderConfig
from moma_lightning.models.preprocess import preprocess_square
from moma_lightning.modules.stage1 import Stage1
from moma_lightning.modules.stage2 import Stage2, Stage2Config
from moma_lightning.optim import OptimizerConfig

LABEL, BATCH = "cat", 24
Run = Callable[[], object]


def batch_of(count: int, device: torch.device) -> TripletBatch:
    """Rendered pictures with captions of different lengths."""
    rng = np.random.default_rng(0)
    rendered = render([world.sample_picture(rng, world.identity("train", i, LABEL)) for i in range(count)])
    places = ["on the beach", "in the city at night", "in the snow"]
    texts = [f"a {LABEL} {places[i % 3]}" for i in range(count)]
    pixels = torch.stack([to_pixel_values(Image.fromarray(picture)) for picture in rendered[0]])
    masks = torch.stack([to_subject_mask(Image.fromarray(mask).convert("L")) for mask in rendered[1]])
    return TripletBatch(pixels.to(device), masks.to(device), texts, [LABEL] * count, [str(i) for i in range(count)])


def step(parameters: list[torch.nn.Parameter], loss: Callable[[], Tensor]) -> Run:
    """A whole step: loss, gradients, AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return run


def trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def stage2(device: torch.device, **options) -> Stage2:
    decoder = f"{MINI}/moma/image_feature_decoder" if options.get("context", "decoder") == "decoder" else None
    return Stage2(FoundationConfig(), Stage2Config(**options), OptimizerConfig(), decoder).to(device)


def stage2_step(module: Stage2, batch: TripletBatch | CachedBatch) -> Run:
    return step(trained(module.adapter), lambda: module.sample_losses(batch, drop=True)[0].mean())


def cached(module: Stage1 | Stage2, batch: TripletBatch) -> CachedBatch:
    return CachedBatch(module.features(batch), batch.subject_mask, batch.caption, batch.label, batch.key, batch.full_caption)


def against_ip_adapter(from_cache: bool) -> Callable[[torch.device], tuple[Run, Run]]:
    def prepare(device: torch.device) -> tuple[Run, Run]:
        batch, moma, ip_adapter = batch_of(BATCH, device), stage2(device), stage2(device, context="image_encoder", subject=False)
        return tuple(stage2_step(module, cached(module, batch) if from_cache else batch) for module in (moma, ip_adapter))  # type: ignore[return-value]

    return prepare


def online_against_cached(device: torch.device) -> tuple[Run, Run]:
    module, batch = stage2(device), batch_of(BATCH, device)
    return stage2_step(module, batch), stage2_step(module, cached(module, batch))


def stage1_against_bare_mllm(device: torch.device, target: bool = False, from_cache: bool = False) -> tuple[Run, Run]:
    """The bare side reads the same pictures and words with the same MLLM; its loss is the mean of its last hidden states.

    target: it makes CLIP's embeddings of the pictures too, as any training towards them has to. from_cache: the stage has its
    frozen features from a cache; the bare side runs its vision tower.
    """
    module, batch = Stage1(FoundationConfig(), DecoderConfig(), OptimizerConfig()).to(device), batch_of(BATCH, device)
    decoder = module.decoder
    white = white_background(batch.pixel_values, batch.subject_mask)
    pixels = preprocess_square(white, decoder.picture_side, decoder.image_processor)
    input_ids, mask = decoder.tokenize(batch.label, batch.caption, decoder.see(white).embeds.shape[1])

    def bare() -> Tensor:
        if target:
            module.target(batch)
        return decoder.mllm(input_ids=input_ids, pixel_values=pixels, attention_mask=mask.long(), use_cache=False).last_hidden_state.mean()

    parameters, read = trained(module), cached(module, batch) if from_cache else batch
    return step(parameters, lambda: module.loss(module(read), module.target(read))), step(parameters, bare)


def cases() -> list[Case]:
    shape = f"mini, batch of {BATCH}, fp32, AdamW"
    return [
        Case("stage 2 step / IP-Adapter step, mini", "<= 1.35", shape, against_ip_adapter(False)),
        Case("stage 2 step / IP-Adapter step, both from a cache, mini", "", shape, against_ip_adapter(True)),
        Case("stage 2 step online / from a cache, mini", ">= 2.0", shape, online_against_cached),
        Case("stage 1 step / bare MLLM, mini", "<= 1.02", shape, stage1_against_bare_mllm),
        Case("stage 1 step from a cache / bare MLLM, mini", "<= 1.02", shape, functools.partial(stage1_against_bare_mllm, from_cache=True)),
        Case("stage 1 step / bare MLLM and target, mini", "<= 1.02", shape, functools.partial(stage1_against_bare_mllm, target=True)),
    ]
