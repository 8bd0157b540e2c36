"""Training that ends well: on a signal with a checkpoint, on numbers that are no numbers without one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from moma_lightning.training.later import Later
from moma_lightning.training.sharding import local

#: A scheduler's notice that the processes will be killed: SLURM sends SIGTERM, or what `sbatch --signal` names.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """Raised when what was made is written. The exit code is 128 + the signal, as shells report it: 143 or 138 (0 of what Lightning's launcher started)."""


class StopOnSignal(Callback):
    """On SIGTERM or SIGUSR1 to any rank: finish the step, save `last`, exit. The same command goes on from there.

    Lightning's own handlers do not save on SIGTERM, broadcast inside a signal handler, and on SLURM save under a name of
    their own that would later win over a newer checkpoint; these take their place while training runs. Several ranks agree on
    the step of decision, one step after the signal, as their GPUs are not waited for. A signal during validation is acted on at the next training
    step.
    """

    def __init__(self, last: Path):
        self.last = last
        self.requested, self._step = 0, 0
        self._asked: Later | None = None  # of any rank, as of the step before

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._asked = trainer.global_step, None
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            signal.signal(number, self._request)  # Lightning puts back what was there before `fit`
        if trainer.received_sigterm:  # before these handlers were there; Lightning would end after the next batch, without saving
            self.requested, trainer._signal_connector.received_sigterm = signal.SIGTERM, False
        # Lightning's own agreement, which its handlers fed, makes every rank wait for its GPU before every batch.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def _request(self, number: int, frame: Any) -> None:
        self.requested = number

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated: a checkpoint would lose them
            return
        self._step = trainer.global_step
        if self._step != trainer.max_steps and self._is_agreed(trainer):  # behind the last step it ends by itself
            trainer.save_checkpoint(self.last)
            trainer._logger_connector.on_batch_end()
            trainer._logger_connector.update_train_step_metrics()  # this step's row, which Lightning would write behind this hook
            rank_zero_info(f"told to end: saved {self.last} at step {self._step}; the same command goes on from there")
            raise Preempted(0 if is_anothers_child(trainer) else 128 + (self.requested or signal.SIGTERM))

    def _is_agreed(self, trainer: Trainer) -> bool:
        if trainer.world_size == 1:
            return self.requested > 0
        asked = torch.full((), self.requested, device=trainer.strategy.root_device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        before, self._asked = self._asked, Later.of(asked)
        if before is None:
            return False
        agreed = int(before.read())
        self.requested = max(self.requested, agreed)  # so that all exit alike
        return agreed > 0


def only_note_sigterm(trainer: Trainer) -> None:
    """Let a SIGTERM be noted in `trainer.received_sigterm`: Lightning's own handler waits, within it, for all processes to be told, of which one may be
    through. Lightning puts back what was there before.
    """
    def note(number: int, frame: Any) -> None:
        trainer._signal_connector.received_sigterm = True

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, note)


def is_anothers_child(trainer: Trainer) -> bool:
    """Whether Lightning's launcher, in the first process, kills that one for an exit code of this one's."""
    return isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment) and trainer.local_rank > 0


@contextmanager
def ended_together(trainer: Trainer) -> Iterator[None]:
    """Where the first process fails, end those that Lightning's launcher has started: it does so only where one of theirs fails, and they would wait."""
    try:
        yield
    except Preempted:
        raise
    except BaseException:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        raise


@dataclass
class Step:
    """What is told of a loss that is not finite. step: of the optimizer."""

    loss: Later
    samples: list[str] | None
    step: int


class StopOnNonFinite(Callback):
    """Stops before a loss or a weight that is not finite reaches a checkpoint; the message names the batch's samples.

    A GPU is not waited for: a step's loss is looked at when the next step has been handed to it, or where a checkpoint is
    written or training ends before that. Raises FloatingPointError. The last checkpoint, from before, stays; the same command
    goes on from it.
    """

    def __init__(self) -> None:
        self.waiting: Step | None = None
        self.samples: list[str] | None = None  # of the last step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.waiting = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.samples = getattr(batch, "key", None)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        before, self.waiting = self.waiting, None if loss is None else Step(Later.of(loss), self.samples, trainer.global_step)
        self._look(trainer, before)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_now(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look_now(trainer)
        kept = getattr(pl_module, "kept", pl_module.state_dict)()  # frozen weights are left out of the checkpoint after this
        for name, tensor in checkpoint["state_dict"].items():
            if name in kept and local(tensor).is_floating_point() and not torch.isfinite(local(tensor)).all():
                self._stop(trainer, f"{name} is not finite", self.samples, trainer.global_step)

    def _look_now(self, trainer: Trainer) -> None:
        before, self.waiting = self.waiting, None
        self._look(trainer, before)

    def _look(self, trainer: Trainer, step: Step | None) -> None:
        if step is not None and not torch.isfinite(loss := step.loss.read()).all():
            self._stop(trainer, f"the loss is {float(loss)}", step.samples, step.step)

    def _stop(self, trainer: Trainer, what: str, samples: list[str] | None, step: int) -> None:
        raise FloatingPointError(
            f"{what} after step {step} on rank {trainer.global_rank}. Samples of the batch: {', '.join(samples or ['unknown'])}. "
            "Nothing was saved since; the last checkpoint is as it was. Started again as it was it comes to the same: lower --model.init_args.optimizer.lr, "
            "or read on in another order by another --data.init_args.config.seed, from there or, by --ckpt_path, from an earlier checkpoint, "
            "where --checkpoint.save_top_k has kept one"
        )
