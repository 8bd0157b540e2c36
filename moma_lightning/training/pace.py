"""How fast training goes, and how long it waits for its data."""

import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Pace(Callback):
    """Logs two figures over the batches between two log entries; those between which training validated or saved are left out.

    `train/samples_per_s`: samples a second of all ranks, whose batches are as long as this one's. (Lightning's ThroughputMonitor would wait for the GPU
    after every batch, and count the time of saving.)
    `train/data_wait`: the share of this rank's time, in [0, 1], that went into waiting for the next batch. The loader tells its seconds by a `waited`
    that only grows, as `datamodules.triplets.TrainLoader`'s does; it is not logged of a loader without. Rank 0's share is what loggers get: it does
    not see that another rank waits.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning counts the optimizer's steps between two entries. Of each batch: samples, seconds waited, seconds in all.
        self._batches: deque[tuple[int, float, float]] = deque(maxlen=max(1, trainer.log_every_n_steps * trainer.accumulate_grad_batches))
        self._waited = getattr(trainer.train_dataloader, "waited", 0.0)
        self._ended, self._interrupted = time.perf_counter(), False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._interrupted = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._interrupted = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        waited, now = getattr(trainer.train_dataloader, "waited", 0.0), time.perf_counter()
        before = self._waited if waited >= self._waited else 0.0  # a new loader
        if not self._interrupted:
            self._batches.append((len(batch), waited - before, now - self._ended))
        self._waited, self._ended, self._interrupted = waited, now, False
        samples, waiting, whole = map(sum, zip(*self._batches, strict=True)) if self._batches else (0, 0.0, 0.0)
        if not whole:
            return
        told = {"train/samples_per_s": trainer.world_size * samples / whole}
        if hasattr(trainer.train_dataloader, "waited"):
            told["train/data_wait"] = waiting / whole
        for name, value in told.items():
            pl_module.log(name, torch.tensor(value), batch_size=1)  # of a number Lightning would make a GPU's, and wait for it
