"""Make a cache of the tiny shards with a stage, and train a stage a few steps."""

from pathlib import Path

from lightning.pytorch import Callback, Trainer, seed_everything

from datamodules.caches.make import CacheConfig, CacheMaker
from datamodules.triplets import TripletConfig, TripletDataModule
from moma_lightning.modules.base import TrainedPartModule

quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def config(folder: Path, **options) -> TripletConfig:
    shards = {"train": str(folder / "train-*.tar"), "val": str(folder / "val-*.tar"), "bad_samples": str(folder / "bad.log")}
    return TripletConfig(**shards | {"batch_size": 4, "steps_per_epoch": 6, "shuffle_buffer": 10} | options)


def opened(folder: Path, **options) -> TripletDataModule:
    module = TripletDataModule(config(folder, **options))
    module.setup("fit")
    return module


def make(folder: Path, out: Path, stage: TrainedPartModule, **options) -> Path:
    trainer = Trainer(default_root_dir=out, **quiet)
    trainer.predict(CacheMaker(stage, config(folder), CacheConfig(**{"dtype": "float32"} | options), out), return_predictions=False)
    return out


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))

    def on_validation_end(self, trainer, module):
        self.values.append(float(trainer.callback_metrics["val/loss"]))


def losses(module: TrainedPartModule, folder: Path, root: Path, **options) -> list[float]:
    """Of six training steps and the validation after them."""
    seed_everything(1, verbose=False)
    kept = Losses()
    trainer = Trainer(max_steps=6, default_root_dir=root, callbacks=[kept], num_sanity_val_steps=0, gradient_clip_val=1.0, **quiet)
    trainer.fit(module, datamodule=TripletDataModule(config(folder, **options)))
    return kept.values


def copied(cache: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in cache.glob("*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
