"""Training steps: stage 2 against an IP-Adapter's and against itself from a cache, stage 1 against the bare MLLM."""

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.caches.samples import trimmed
from datamodules.mini import world
from datamodules.mini.render import render
from datamodules.samples import to_pixel_values, to_subject_mask
from experiments.benchmarks.timing import PRECISION, Case, Run, dtype_of
from experiments.benchmarks.true_models import SD15, random_batch, random_stage
from experiments.mini.models import MINI, mini_foundation
from moma_lightning.batch import CachedBatch, TripletBatch, white_background
from moma_lightning.models.image_feature_decoder import DecoderConfig
from moma_lightning.models.preprocess import preprocess_square
from moma_lightning.modules.stage1 import Stage1
from moma_lightning.modules.stage2 import Stage2, Stage2Config
from moma_lightning.optim import OptimizerConfig
from moma_lightning.plan import architectures
from moma_lightning.plan.stages import Experiment, read_experiment

LABEL, BATCH = "cat", 24


def batch_of(count: int, device: torch.device) -> TripletBatch:
    """Rendered pictures with captions of different lengths."""
    rng = np.random.default_rng(0)
    rendered = render([world.sample_picture(rng, world.identity("train", i, LABEL)) for i in range(count)])
    places = ["on the beach", "in the city at night", "in the snow"]
    texts = [f"a {LABEL} {places[i % 3]}" for i in range(count)]
    pixels = to_pixel_values(torch.from_numpy(rendered[0]).permute(0, 3, 1, 2))
    masks = to_subject_mask(torch.from_numpy(rendered[1]).unsqueeze(1))
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
    return Stage2(mini_foundation(), Stage2Config(**options), OptimizerConfig(), decoder).to(device)


def stage2_loss(module: Stage2, batch: TripletBatch | CachedBatch, bf16: bool) -> Tensor:
    """bf16: under autocast, as Lightning's bf16-mixed has it."""
    with torch.autocast(batch.subject_mask.device.type, torch.bfloat16, enabled=bf16):
        return module.sample_losses(batch, drop=True)[0].mean()


def stage2_step(module: Stage2, batch: TripletBatch | CachedBatch, bf16: bool = False) -> Run:
    return step(trained(module.adapter), lambda: stage2_loss(module, batch, bf16))


def cached(module: Stage1 | Stage2, batch: TripletBatch) -> CachedBatch:
    features = {name: trimmed(name, feature) for name, feature in module.features(batch).items()}  # as the loader has them
    return CachedBatch(features, batch.subject_mask, batch.caption, batch.label, batch.key, batch.full_caption)


def against_ip_adapter(from_cache: bool = False, its_draws: int = 1, **options) -> Callable[[torch.device], tuple[Run, Run]]:
    """from_cache: both sides. options: of MoMA's side. Both have as many rows of the UNet, whatever either's `noise_draws`."""
    def prepare(device: torch.device) -> tuple[Run, Run]:
        runs = []
        for module in (stage2(device, **options), stage2(device, context="image_encoder", subject=False, noise_draws=its_draws)):
            batch = batch_of(BATCH // module.config.noise_draws, device)
            runs.append(stage2_step(module, cached(module, batch) if from_cache else batch))
        return runs[0], runs[1]

    return prepare


def online_against_cached(device: torch.device, reference: bool = False) -> tuple[Run, Run]:
    """reference: the cache holds the reference pass's features too."""
    module, offline, batch = stage2(device), stage2(device, cache_reference=reference), batch_of(BATCH, device)
    return stage2_step(module, batch), stage2_step(offline, cached(offline, batch))


def stage1_against_bare_mllm(device: torch.device, target: bool = False, from_cache: bool = False) -> tuple[Run, Run]:
    """The bare side reads the same pictures and words with the same MLLM; its loss is the mean of its last hidden states.

    target: it makes CLIP's embeddings of the pictures too, as any training towards them has to. from_cache: the stage has its
    frozen features from a cache; the bare side runs its vision tower.
    """
    module, batch = Stage1(mini_foundation(), DecoderConfig(), OptimizerConfig()).to(device), batch_of(BATCH, device)
    bare = bare_mllm(module, batch)

    def beside_target() -> Tensor:
        module.target(batch)
        return bare()

    parameters, read = trained(module), cached(module, batch) if from_cache else batch
    return step(parameters, lambda: stage1_loss(module, read)), step(parameters, beside_target if target else bare)


def stage1_loss(module: Stage1, batch: TripletBatch | CachedBatch) -> Tensor:
    predicted, target = module.predicted_and_target(batch)
    return module.loss(predicted.float(), target)


@torch.no_grad()
def bare_mllm(module: Stage1, batch: TripletBatch) -> Callable[[], Tensor]:
    """The mean of the MLLM's last hidden states for the batch's pictures and instructions, which are prepared here."""
    decoder, device = module.decoder, batch.pixel_values.device
    white = white_background(batch.pixel_values, batch.subject_mask)
    pixels = preprocess_square(white, decoder.picture_side, decoder.image_processor).to(decoder.mllm.dtype)
    input_ids, mask = (t.to(device) for t in decoder.tokenize(batch.label, batch.caption, decoder.see(white).embeds.shape[1]))
    read = {"input_ids": input_ids, "pixel_values": pixels, "attention_mask": mask.long()}
    return torch.enable_grad()(lambda: decoder.mllm(**read, use_cache=False).last_hidden_state.mean())


def true_stage2(device: torch.device, batch_size: int | None = None, **options) -> tuple[Stage2, TripletBatch]:
    """The paper's stage 2 with random weights, and a batch, of its size where nothing else is said; options: of `Stage2Config`."""
    experiment = read_experiment(SD15 / "stage2.yaml")
    experiment = replace(experiment, batch_size=batch_size or experiment.batch_size)
    experiment = replace(experiment, model=experiment.model | {"stage2": experiment.model["stage2"] | options})
    module = random_stage(experiment, device)
    assert isinstance(module, Stage2)
    if device.type != "cpu":
        module.hold_frozen()
    return module, random_batch(experiment, device)


def true_against_ip_adapter(device: torch.device) -> tuple[Run, Run]:
    runs = []
    for options in ({}, {"context": "image_encoder", "subject": False}):
        runs.append(stage2_step(*true_stage2(device, **options), bf16=device.type != "cpu"))
    return runs[0], runs[1]


def true_subject_side(device: torch.device, from_cache: bool = False, reference: bool = False) -> tuple[Run, Run]:
    """The same models with and without the subject: what the reference pass and the subject attention add to an IP-Adapter's step.

    Both take CLIP's embedding; a batch of one on a CPU, where the MLLM would not fit beside the rest. from_cache: both sides; the embedding is read
    there, so that it does not matter whose it is. reference: MoMA's cache holds the reference pass's features too.
    """
    module, batch = true_stage2(device, 1 if device.type == "cpu" else None, context="image_encoder", cache_reference=reference)
    read = cached(module, batch) if from_cache else batch

    def run(config: Stage2Config) -> Run:
        def loss() -> Tensor:
            module.config = config
            return stage2_loss(module, read, bf16=device.type != "cpu")

        return step([p for name, p in module.adapter.named_parameters() if config.subject or not name.startswith("subject.")], loss)

    return run(module.config), run(replace(module.config, subject=False, cache_reference=False))


def true_online_against_cached(device: torch.device, reference: bool = False) -> tuple[Run, Run]:
    """On a CPU, which does not hold the MLLM beside the rest, CLIP's embedding is what the cache saves, and one picture is a batch."""
    on_cpu: dict[str, Any] = {"batch_size": 1, "context": "image_encoder"} if device.type == "cpu" else {}
    module, batch = true_stage2(device, **on_cpu, cache_reference=reference)
    return tuple(stage2_step(module, read, bf16=device.type != "cpu") for read in (batch, cached(module, batch)))  # type: ignore[return-value]


def true_stage1_against_bare_mllm(device: torch.device, layers: int | None = None) -> tuple[Run, Run]:
    """Losses and gradients alone: two optimizers' moments would not fit beside the weights, and both sides' take as long.

    layers: of the language model's, the first ones only and one picture, so that a CPU can hold and time it: the rest of the step is all there.
    """
    experiment = replace(read_experiment(SD15 / "stage1.yaml"), batch_size=1 if layers else 8)
    with shortened(experiment, layers) if layers else contextlib.nullcontext(experiment) as experiment:
        module, batch = random_stage(experiment, device).to(dtype_of(device)), random_batch(experiment, device)
    assert isinstance(module, Stage1)
    parameters = trained(module)

    def gradients(loss: Callable[[], Tensor]) -> Run:
        def run() -> None:
            for parameter in parameters:
                parameter.grad = None
            loss().backward()

        return run

    return gradients(lambda: stage1_loss(module, batch)), gradients(bare_mllm(module, batch))


@contextlib.contextmanager
def shortened(experiment: Experiment, layers: int) -> Iterator[Experiment]:
    """The experiment with so many layers of its language model, whose `config.json` lies in a folder while this lasts."""
    options = architectures.read(experiment.model["foundation"]["mllm"])
    options["text_config"] = options["text_config"] | {"num_hidden_layers": layers}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(options))
        yield replace(experiment, model=experiment.model | {"foundation": experiment.model["foundation"] | {"mllm": folder}})


def cases(full: bool) -> list[Case]:
    shape, rows = f"mini, batch of {BATCH}, fp32, AdamW", f"mini, {BATCH} rows, fp32, AdamW"
    listed = [
        Case("stage 2 step / IP-Adapter step, mini", "<= 1.35", shape, against_ip_adapter()),
        Case("stage 2 step / IP-Adapter step, both from a cache, mini", "<= 1.35", shape, against_ip_adapter(from_cache=True)),
        Case("stage 2 step / IP-Adapter step, both from a cache, with the reference, mini", "<= 1.35", shape,
             against_ip_adapter(from_cache=True, cache_reference=True)),
        Case("stage 2 step / IP-Adapter step, both with CLIP's embedding, mini", "<= 1.35", shape, against_ip_adapter(context="image_encoder")),
        *(Case(f"stage 2 step of {draws} noise draws / IP-Adapter step, mini", "<= 1.35", rows, against_ip_adapter(noise_draws=draws)) for draws in (2, 4)),
        *(Case(f"stage 2 step of {draws} noise draws / IP-Adapter step of as many, mini", "", rows, against_ip_adapter(noise_draws=draws, its_draws=draws))
          for draws in (2, 4)),
        Case("stage 2 step online / from a cache, mini", ">= 2.0", shape, online_against_cached),
        Case("stage 2 step online / from a cache with the reference, mini", ">= 2.0", shape, functools.partial(online_against_cached, reference=True)),
        Case("stage 1 step / bare MLLM, mini", "<= 1.02", shape, stage1_against_bare_mllm),
        Case("stage 1 step from a cache / bare MLLM, mini", "<= 1.02", shape, functools.partial(stage1_against_bare_mllm, from_cache=True)),
        Case("stage 1 step / bare MLLM and target, mini", "<= 1.02", shape, functools.partial(stage1_against_bare_mllm, target=True)),
    ]
    if full:
        one = f"batch of 8, on a CPU 1, at 512 px, {PRECISION}, AdamW"
        saved = f"SD 1.5 and LLaVA-1.5-7B, on a CPU CLIP ViT-H/14, random weights, {one}"
        shape = f"SD 1.5 and LLaVA-1.5-7B, random weights, batch of 8 at 512 px, {PRECISION}, AdamW"
        listed += [
            Case("stage 2 step / IP-Adapter step, sd15", "<= 1.35", shape, true_against_ip_adapter),
            Case("stage 2 step / IP-Adapter step, both with CLIP's embedding, sd15", "<= 1.35",
                 f"SD 1.5 and CLIP ViT-H/14, random weights, {one}", true_subject_side),
            Case("stage 2 step / IP-Adapter step, both from a cache, sd15", "<= 1.35", f"SD 1.5, random weights, {one}",
                 functools.partial(true_subject_side, from_cache=True)),
            Case("stage 2 step / IP-Adapter step, both from a cache, with the reference, sd15", "<= 1.35", f"SD 1.5, random weights, {one}",
                 functools.partial(true_subject_side, from_cache=True, reference=True)),
            Case("stage 2 step online / from a cache, sd15", ">= 2.0", saved, true_online_against_cached),
            Case("stage 2 step online / from a cache with the reference, sd15", ">= 2.0", saved, functools.partial(true_online_against_cached, reference=True)),
            Case("stage 1 step / bare MLLM, sd15", "<= 1.02", f"LLaVA-1.5-7B, random weights, batch of 8 at 512 px, {PRECISION}, no optimizer",
                 true_stage1_against_bare_mllm),
            *(Case(f"stage 1 step / bare MLLM, {layers} of LLaVA-1.5-7B's 32 layers", "", f"random weights, a picture of 512 px, {PRECISION}, no optimizer",
                   functools.partial(true_stage1_against_bare_mllm, layers=layers)) for layers in (2, 4)),
        ]
    return listed
