"""How long training waits for its data."""

import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class DataWait(Callback):
    """Logs `train/data_wait`: the share of this rank's time, in [0, 1], that went into waiting for the next batch.

    Over the batches between two log entries; those between which training validated or saved are left out. The loader tells its seconds by a `waited`
    that only grows, as `datamodules.triplets.TrainLoader`'s does; nothing is logged of a loader without. Rank 0's share is what loggers get: it does
    not see that another rank waits.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning counts the optimizer's steps between two entries.
        self._seconds: deque[tuple[float, float]] = deque(maxlen=max(1, trainer.log_every_n_steps * trainer.accumulate_grad_batches))  # waited, in all
        self._waited = getattr(trainer.train_dataloader, "waited", 0.0)
        self._ended, self._interrupted = time.perf_counter(), False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._interrupted = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._interrupted = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        waited, now = getattr(trainer.train_dataloader, "waited", None), time.perf_counter()
        if waited is None:
            return
        before = self._waited if waited >= self._waited else 0.0  # a new loader
        if not self._interrupted:
            self._seconds.append((waited - before, now - self._ended))
        self._waited, self._ended, self._interrupted = waited, now, False
        waiting, whole = map(sum, zip(*self._seconds, strict=True)) if self._seconds else (0.0, 0.0)
        if whole:
            pl_module.log("train/data_wait", torch.tensor(waiting / whole), batch_size=1)  # of a number Lightning would make a GPU's, and wait for it
