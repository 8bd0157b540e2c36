"""Training that ends well: on a signal with a checkpoint, on numbers that are no numbers without one."""

import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from moma_lightning.training.sharding import local

#: A scheduler's notice that the processes will be killed: SLURM sends SIGTERM, or what `sbatch --signal` names.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """Raised after the checkpoint is written. The exit code is 128 + the signal, as shells report it: 143 or 138."""


class StopOnSignal(Callback):
    """On SIGTERM or SIGUSR1 to any rank: finish the step, save `last`, exit. The same command goes on from there.

    Lightning's own handlers do not save on SIGTERM, broadcast inside a signal handler, and on SLURM save under a name of
    their own that would later win over a newer checkpoint; these take their place while training runs. The step of
    decision is agreed on by all ranks. A signal during validation is acted on at the next training step.
    """

    def __init__(self, last: Path):
        self.last = last
        self.requested, self._step = 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            signal.signal(number, self._request)  # Lightning puts back what was there before `fit`

    def _request(self, number: int, frame: Any) -> None:
        self.requested = number

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated: a checkpoint would lose them
            return
        self._step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self.requested > 0, all=False):
            trainer.save_checkpoint(self.last)
            rank_zero_info(f"told to end: saved {self.last} at step {self._step}; the same command goes on from there")
            raise Preempted(128 + (self.requested or signal.SIGTERM))


class StopOnNonFinite(Callback):
    """Stops before a loss or a weight that is not finite reaches a checkpoint; the message names the batch's samples.

    Raises FloatingPointError. The last checkpoint, from before, stays; the same command goes on from it.
    """

    samples: list[str] | None = None  # of the last step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.samples = getattr(batch, "key", None)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is not None and not torch.isfinite(loss).all():
            self._stop(trainer, f"the loss is {float(loss)}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for name, tensor in checkpoint["state_dict"].items():
            if tensor.is_floating_point() and not torch.isfinite(local(tensor)).all():
                self._stop(trainer, f"{name} is not finite")

    def _stop(self, trainer: Trainer, what: str) -> None:
        raise FloatingPointError(
            f"{what} after step {trainer.global_step} on rank {trainer.global_rank}. Samples of the batch: {', '.join(self.samples or ['unknown'])}. "
            "Nothing was saved since; the last checkpoint is as it was"
        )
