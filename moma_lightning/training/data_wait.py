"""How long training waits for its data."""

import time
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class DataWait(Callback):
    """Logs `train/data_wait`: the share of this rank's time, in [0, 1], that went into waiting for the next batch.

    Of the last `log_every_n_steps` batches; validation, checkpoints and the copy to a GPU count on neither side. The loader tells its seconds by a
    `waited` that only grows, as `datamodules.triplets.TrainLoader`'s does; nothing is logged of a loader without. A process waits for
    its GPU too: what is logged is an upper bound of how long the GPU stood still for want of data.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds: deque[tuple[float, float]] = deque(maxlen=max(1, trainer.log_every_n_steps))  # waited for a batch, and spent on it
        self._waited = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        waited = getattr(trainer.train_dataloader, "waited", None)
        if waited is None:
            return
        self._seconds.append((waited - self._waited, time.perf_counter() - self._begun))
        self._waited = waited
        waiting, working = map(sum, zip(*self._seconds, strict=True))
        pl_module.log("train/data_wait", waiting / (waiting + working) if waiting + working else 0.0, batch_size=1)
