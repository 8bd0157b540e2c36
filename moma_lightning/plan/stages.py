"""A stage as its YAML describes it, without weights, and one training step of it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from moma_lightning import optim
from moma_lightning.batch import TripletBatch
from moma_lightning.foundation import Base, FoundationConfig, ImageEncoder
from moma_lightning.models.adapter import MoMAAdapter
from moma_lightning.models.caption_encoder import CaptionEncoder
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.modules.base import TrainedPartModule
from moma_lightning.modules.grid import GridConfig
from moma_lightning.modules.stage1 import EditConfig, Stage1
from moma_lightning.modules.stage2 import Stage2
from moma_lightning.modules.stage2_parts import Stage2Config, build_adapter
from moma_lightning.plan import architectures
from moma_lightning.training.options import Checkpointing, TrainingOptions


@dataclass
class Experiment:
    """What of a training YAML decides memory and time; `model` are the stage's own arguments.

    batch_size: samples a rank and micro-batch. max_steps: optimizer steps, or -1.
    """

    stage: type[TrainedPartModule]
    model: dict[str, Any]
    batch_size: int
    image_size: int
    max_steps: int
    accumulate: int
    bf16: bool

    @property
    def training(self) -> TrainingOptions:
        return TrainingOptions(**self.model["training"])

    @property
    def draws(self) -> int:
        """Rows of the UNet's batch for each sample."""
        return self.model.get("stage2", {}).get("noise_draws", 1)

    def with_checkpointing(self, policy: Checkpointing) -> "Experiment":
        return replace(self, model=self.model | {"training": self.model["training"] | {"activation_checkpointing": policy}})


def read_experiment(path: Path) -> Experiment:
    """Read a YAML as `fit` does, unknown keys being errors, but build nothing."""
    from moma_lightning.cli import MoMACLI

    class Reader(MoMACLI):
        def before_instantiate_classes(self) -> None: ...
        def instantiate_classes(self) -> None: ...

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python")
        config = _plain(Reader(run=False, args=["--config", str(path), "--seed_everything", "false"]).config.as_dict())
    stages = {f"{stage.__module__}.{stage.__name__}": stage for stage in (Stage1, Stage2)}
    name = config["model"]["class_path"]
    if name not in stages:
        raise ValueError(f"{path}: {name} cannot be planned, only {' and '.join(stages)}")
    data, trainer = config["data"]["init_args"]["config"], config["trainer"]
    return Experiment(stages[name], config["model"]["init_args"], data["batch_size"], data["image_size"], trainer["max_steps"],
                      trainer["accumulate_grad_batches"], str(trainer["precision"]).startswith("bf16"))


def _plain(tree: Any) -> Any:
    """Without the notes on which file a part was read from."""
    return {key: _plain(value) for key, value in tree.items() if key != "__path__"} if isinstance(tree, dict) else tree


@no_init_weights()
def build(experiment: Experiment) -> TrainedPartModule:
    """The stage with parts of the right shapes; activation checkpointing and the choice of what is trained are as in training."""
    options = experiment.model
    foundation, optimizer = FoundationConfig(**options["foundation"]), optim.OptimizerConfig(**options["optimizer"])
    if options.get("cached") or options.get("stage2", {}).get("cached"):
        raise ValueError("a training from cached shards cannot be planned: its batches hold features; plan it with `cached: false`, which is an upper bound")
    if foundation.mllm_quantization:
        raise ValueError(f"foundation.mllm_quantization {foundation.mllm_quantization} cannot be planned: a quantized stage is not sharded; plan it without")
    if experiment.stage is Stage1:
        return PlannedStage1(foundation, DecoderConfig.from_dict(options["decoder"]), optimizer, options["clip"], options["loss"],
                             EditConfig(**options["edits"]), experiment.training)
    return PlannedStage2(foundation, Stage2Config(**options["stage2"]), optimizer, grid=GridConfig(pictures=0), training=experiment.training)


class PlannedStage1(Stage1):
    """Stage 1 without weights."""

    def load_parts(self, decoder: DecoderConfig, clip: str | None, cached: bool) -> tuple[ImageEncoder, ImageFeatureDecoder, CaptionEncoder | None]:
        encoder = architectures.build_image_encoder(self.foundation)
        trained = architectures.build_decoder(self.foundation, decoder, encoder.embed_dim)
        return encoder, trained, architectures.build_caption_encoder(clip) if clip else None


class PlannedStage2(Stage2):
    """Stage 2 without weights."""

    def load_parts(self) -> tuple[Base, ImageEncoder | None, ImageFeatureDecoder | None, MoMAAdapter]:
        config, foundation = self.config, self.foundation
        encoder, base, decoder = architectures.build_image_encoder(foundation), architectures.build_base(foundation), None
        if config.context == "decoder":
            decoder = architectures.build_decoder(foundation, DecoderConfig(), encoder.embed_dim, getattr(torch, foundation.mllm_dtype))
        adapter = build_adapter(base, replace(foundation, ip_adapter=None), config, encoder.embed_dim)
        return base, encoder if decoder is None else None, decoder, adapter


def batch_of(experiment: Experiment) -> TripletBatch:
    count, size = experiment.batch_size, experiment.image_size
    return TripletBatch(torch.zeros(count, 3, size, size), torch.ones(count, 1, size, size), ["a cat"] * count, ["cat"] * count, ["0"] * count)


def loss_of(module: TrainedPartModule) -> Callable[[TripletBatch], Tensor]:
    """The stage's training loss, without its logging and without dropout (which looks at values)."""
    if isinstance(module, Stage1):
        return lambda batch: module.loss(*module.predicted_and_target(batch))
    return lambda batch: module.sample_losses(batch, drop=False)[0].mean()
