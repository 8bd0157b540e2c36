"""Trainings on two gloo processes for the tests of sharding: python -m tests.moma_lightning.training.sharded_run <folder> [spoilt].

`<folder>/foundation.json` says where the tiny models are. Batches, noise and dropout are those of the whole global batch, of
which each rank takes its part, so that any number of ranks must give the same losses. Results go to `<folder>/<name>.json`.
"""

import json
import os
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.plugins import FSDPPrecision
from torch.utils.data import DataLoader

from moma_lightning.batch import TripletBatch
from moma_lightning.foundation import FoundationConfig
from moma_lightning.models.image_feature_decoder import DecoderConfig
from moma_lightning.models.lora import LoraOptions
from moma_lightning.modules.stage1 import Stage1
from moma_lightning.modules.stage2 import GridConfig, Stage2, Stage2Config
from moma_lightning.optim import OptimizerConfig
from moma_lightning.training.ema import EMA
from moma_lightning.training.guards import StopOnNonFinite
from moma_lightning.training.options import TrainingOptions
from moma_lightning.training.random_states import RandomStates
from moma_lightning.training.sharding import local, over_ranks
from moma_lightning.training.strategy import FlatShardedStrategy, ShardedStrategy

STEPS, AFTER = 20, 3


class SameNoise(Stage2):
    """Stage 2 whose random numbers belong to the samples: drawn for the global batch, cut to the rank's part."""

    @torch.no_grad()
    def latents(self, batch, generator=None):
        target = self.vae.encode(batch.pixel_values).latent_dist.mode() * self.vae.config.scaling_factor
        return target, target

    def random_draws(self, latents, generator, drop, draws=1):
        rng = torch.Generator().manual_seed(self.global_step)
        size, start, whole = len(latents), self.global_rank * len(latents), len(latents) * self.trainer.world_size
        noise = torch.randn(whole, *latents.shape[1:], generator=rng)[start : start + size]
        timesteps = torch.randint(0, 1000, (whole,), generator=rng)[start : start + size]
        chance = torch.rand(2, whole, generator=rng)[:, start : start + size]
        return noise.to(self.device), timesteps.to(self.device), chance.to(self.device)


@dataclass
class Size:
    """pictures: of all ranks in a step; side in pixels."""

    pictures: int = 4
    side: int = 32


def global_batch(seed: int, rank: int, ranks: int, size: Size = Size()) -> TripletBatch:  # noqa: B008
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.rand(size.pictures, 1, size.side, size.side, generator=rng) > 0.5).float()
    pixels = torch.rand(size.pictures, 3, size.side, size.side, generator=rng) * 2 - 1
    count = size.pictures // ranks
    part = slice(rank * count, (rank + 1) * count)
    return TripletBatch(pixels[part], mask[part], ["a cat on a lake"] * count, ["cat"] * count, [f"{seed}-{i}" for i in range(size.pictures)][part])


class Held(Callback):
    """Bytes that this rank holds: parameters with buffers, gradients before the optimizer's step, optimizer state after it."""

    def __init__(self):
        self.bytes = {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        parameters = list(module.parameters())
        self.bytes["parameters"] = size_of([*parameters, *module.buffers()])
        self.bytes["gradients"] = size_of([p.grad for p in parameters if p.grad is not None])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        self.bytes["optimizer"] = size_of(states)


def size_of(tensors) -> int:
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


class Drawn(Callback):
    """What the generators of each rank give at the first step."""

    def __init__(self):
        self.numbers = None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.numbers is None:
            self.numbers = over_ranks([random.random(), np.random.rand(), torch.rand(()).item()])  # noqa: NPY002


class Accumulated(Callback):
    """Numbers in FSDP1's outermost flat gradient after the first of several micro-batches, and in this rank's part of the parameter."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 0:
            flat = trainer.model._handle.flat_param
            self.sizes = [flat.grad.numel(), flat.numel()]


class Norms(Callback):
    """What every step's gradients were before they were clipped, by the log."""

    def __init__(self):
        self.numbers = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.numbers.append(float(trainer.callback_metrics["train/grad_norm"]))


class Losses(Callback):
    """The mean loss over ranks of every step, and checkpoints at step `at`: one for each path given."""

    def __init__(self, *save: Path, at: int = STEPS // 2):
        self.losses, self.save, self.at = [], save, at

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))
        for path in self.save if trainer.global_step == self.at else ():
            if hasattr(trainer.strategy, "_save_distributed_checkpoint"):
                trainer.strategy._save_distributed_checkpoint = path.name.startswith("sharded")
            trainer.save_checkpoint(path)


def build(stage: str, foundation: FoundationConfig, decoder: str, config: DecoderConfig = DecoderConfig(), **training):  # noqa: B008
    """A module with its optimizer; the same weights on every call."""
    seed_everything(0, verbose=False)
    options = TrainingOptions(**training)
    if stage == "stage1":
        return Stage1(foundation, config, OptimizerConfig(lr=1e-3, warmup_steps=15), training=options)
    optimizer = OptimizerConfig(lr=1e-3, lr_multipliers={"lambda_": 10.0})
    return SameNoise(foundation, Stage2Config(context_dropout=0.5), optimizer, decoder, GridConfig(pictures=0), options)


#: Adapters on the language model; every one of its linear layers lies in a unit.
LORA = DecoderConfig(lora=LoraOptions(rank=2))
#: Other trainings than the two of the paper: (stage, name in foundation.json, decoder).
VARIANTS = {"lora": ("stage1", "foundation", LORA), "idefics3": ("stage1", "idefics3", DecoderConfig()), "sdxl": ("stage2", "sdxl", DecoderConfig())}
VARIANT_STEPS = 5


def build_variant(name: str, places: dict):
    stage, foundation, config = VARIANTS[name]
    return build(stage, FoundationConfig(**places[foundation]), places["decoder"], config)


def train(module, folder: Path, ranks: int, strategy, save=(), resume: Path | None = None, steps: int = STEPS, callbacks=(),
          size: Size = Size(), **options) -> list[float]:  # noqa: B008
    """20 steps, or the few after a checkpoint's; clipped so that the norm matters."""
    done = STEPS // 2 if resume else 0
    recorder = Losses(*save, at=done + AFTER if resume else STEPS // 2)
    trainer = Trainer(max_steps=done + AFTER if resume else steps, max_epochs=1, default_root_dir=folder, devices=ranks,
                      strategy=strategy, logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                      gradient_clip_val=0.05, callbacks=[*callbacks, recorder], num_sanity_val_steps=0,
                      **{"limit_val_batches": 0, "accelerator": "cpu"} | options)
    trainer.fit(module, Rest(done, size), ckpt_path=resume)
    return recorder.losses


class Rest(LightningDataModule):
    """The global batches from `first` on."""

    def __init__(self, first: int, size: Size):
        super().__init__()
        self.first, self.size = first, size

    def train_dataloader(self):
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return Sized([global_batch(seed, rank, ranks, self.size) for seed in range(self.first, STEPS)])

    def val_dataloader(self):
        return DataLoader([global_batch(99, self.trainer.global_rank, self.trainer.world_size, self.size)], batch_size=None)


class Uneven(LightningDataModule):
    """Three batches to validate, of 4, 3 and 2 samples; the second of two ranks has one alone and gives it again."""

    def val_dataloader(self):
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        batches = [global_batch(pictures, 0, 1, Size(pictures)) for pictures in (4, 3, 2)][rank::ranks]
        again = [replace(batches[-1], repeated=True)] if ranks > 1 and len(batches) < 2 else []
        return DataLoader(batches + again, batch_size=None)


def scores(module, folder: Path, ranks: int, strategy) -> dict[str, float]:
    trainer = Trainer(devices=ranks, strategy=strategy, accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
                      enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False)
    return trainer.validate(module, Uneven(), verbose=False)[0]


class Sized(list):
    """A list that is as long as the epoch, as Lightning expects of a loader that goes on within one."""

    def __len__(self):
        return STEPS


def in_bf16(module, folder: Path) -> tuple[list[float], dict[str, str]]:
    """Two steps with a picture grid, and in what type some parameters are while the forward pass runs."""
    dtypes = {}

    def note(name, parameter):
        return lambda *_: dtypes.__setitem__(name, str(getattr(parameter(), "dtype", None)))

    module.unet.mid_block.register_forward_hook(note("unet", lambda: next(module.unet.mid_block.parameters())))
    module.unet.register_forward_hook(note("lambda", lambda: next(iter(module.adapter.subject.values())).lambda_))
    module.grid = GridConfig(pictures=1, num_inference_steps=2)
    losses = train(module, folder, 2, ShardedStrategy(), steps=2, precision="bf16-mixed", limit_val_batches=1, val_check_interval=2)
    dtypes["kept"] = str(next(module.adapter.parameters()).dtype)
    return losses, dtypes


def flat(stage: str, folder: Path, places: dict) -> dict[str, list[float]]:
    """FSDP1: the same 20 steps, validation and its pictures among them, and the steps after checkpoints of one process and of two."""
    foundation, decoder, home = FoundationConfig(**places["foundation"]), places["decoder"], folder / stage
    module = build(stage, foundation, decoder)
    if stage == "stage2":
        module.grid = GridConfig(pictures=1, num_inference_steps=2)
    norms = Norms()
    callbacks = [EMA(0.9), RandomStates(), StopOnNonFinite(), norms]
    losses = {f"flat-{stage}": train(module, home / "flat", 2, FlatShardedStrategy(), [home / "flat-2.ckpt"], callbacks=callbacks,
                                     limit_val_batches=1, val_check_interval=5)}
    losses[f"flat-{stage}/norms"] = norms.numbers
    for name in ("full-1.ckpt", "flat-2.ckpt"):
        module, again = build(stage, foundation, decoder), home / f"flat-{name}"
        losses[f"flat-{stage}/{name}"] = train(module, again, 2, FlatShardedStrategy(), [again / "later.ckpt"], resume=home / name, callbacks=[EMA(0.9)])
    return losses


class FlatPrecision(FSDPPrecision):
    """FSDP1's, with autocast where these tests run."""

    def forward_context(self):
        return torch.autocast("cpu", torch.bfloat16)


def flat_in_bf16(module, folder: Path) -> tuple[list[float], list[str]]:
    """Three steps, and the types of a block's and of the token's parameters within the forward pass, and of all after it."""
    dtypes = []
    block = module.decoder.mllm.get_decoder().layers[0]
    block.register_forward_hook(lambda *_: dtypes.append(str(block.mlp.up_proj.weight.dtype)))
    module.decoder.mapping.register_forward_hook(lambda mapping, *_: dtypes.append(str(mapping.down_proj.weight.dtype)))
    losses = train(module, folder, 2, FlatShardedStrategy(), steps=3, plugins=[FlatPrecision("bf16-mixed")])
    return losses, [*dtypes[:2], *sorted({str(p.dtype) for p in module.parameters() if p.requires_grad})]


def compiled(module, folder: Path) -> list[float]:
    """Three steps of a compiled UNet; backend "eager" leaves the kernels as they are."""
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module: compile_module(module, backend="eager")
    try:
        return train(module, folder, 2, ShardedStrategy(), steps=3)
    finally:
        torch.nn.Module.compile = compile_module


class Spoilt(SameNoise):
    """Its loss is no number on rank 1 at the step before the checkpoint."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_rank == 1 and self.global_step == STEPS // 2 - 1 else loss


def spoilt(folder: Path) -> None:
    places = json.loads((folder / "foundation.json").read_text())
    module = build("stage2", FoundationConfig(**places["foundation"]), places["decoder"])
    module.__class__ = Spoilt
    train(module, folder / "spoilt", 2, ShardedStrategy(), [folder / "spoilt.ckpt"], callbacks=[StopOnNonFinite()])


def main(folder: Path) -> None:
    places = json.loads((folder / "foundation.json").read_text())
    foundation, decoder = FoundationConfig(**places["foundation"]), places["decoder"]
    results = {}
    results["bf16"], results["dtypes"] = in_bf16(build("stage2", foundation, decoder, activation_checkpointing="all"), folder / "bf16")
    for stage in ("stage1", "stage2"):
        home = folder / stage
        saves = [home / "full-2.ckpt", home / "sharded-2.ckpt"]
        held, drawn, norms = Held(), Drawn(), Norms()
        callbacks = [EMA(0.9), RandomStates(), held, drawn, norms]
        results[stage] = train(build(stage, foundation, decoder), home / "two", 2, ShardedStrategy(), saves, callbacks=callbacks)
        results[f"{stage}/held"], results[f"{stage}/drawn"], results[f"{stage}/norms"] = held.bytes, drawn.numbers, norms.numbers
        for name in ("full-1.ckpt", "sharded-2.ckpt"):
            results[f"{stage}/{name}"] = train(build(stage, foundation, decoder), home / "again", 2, ShardedStrategy(), resume=home / name)
    results["scores"] = scores(build("stage1", foundation, decoder), folder / "scores", 2, ShardedStrategy())
    results["flat-scores"] = scores(build("stage1", foundation, decoder), folder / "flat-scores", 2, FlatShardedStrategy())
    for name in VARIANTS:
        held = Held()
        results[name] = train(build_variant(name, places), folder / name / "two", 2, ShardedStrategy(), steps=VARIANT_STEPS, callbacks=[held])
        results[f"{name}/held"] = held.bytes
    for stage in ("stage1", "stage2"):
        results |= flat(stage, folder, places)
    results["flat-bf16"], results["flat-dtypes"] = flat_in_bf16(build("stage1", foundation, decoder, activation_checkpointing="blocks"), folder / "flat-bf16")
    results["flat-lora"] = train(build_variant("lora", places), folder / "flat-lora", 2, FlatShardedStrategy(), steps=VARIANT_STEPS)
    results["compiled"] = compiled(build("stage2", foundation, decoder, compile=True), folder / "compiled")
    results["copies"] = train(build("stage2", foundation, decoder), folder / "copies", 2, ShardedStrategy(shard_size=1), steps=5)
    results["accumulated"] = train(build("stage2", foundation, decoder), folder / "accumulated", 2, ShardedStrategy(), steps=3, accumulate_grad_batches=2)
    module = build("stage2", foundation, decoder)
    parts = Accumulated()
    results["flat-accumulated"] = train(module, folder / "flat-accumulated", 2, FlatShardedStrategy(), steps=3, accumulate_grad_batches=2, callbacks=[parts])
    results["flat-parts"] = parts.sizes
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    (spoilt if sys.argv[2:] == ["spoilt"] else main)(Path(sys.argv[1]))
