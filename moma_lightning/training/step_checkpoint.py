"""When checkpoints are saved: between steps, never within one."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn


class StepCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that never saves between two micro-batches, whose gradients would be lost, nor before a last validation, which would be left out.

    So it does not save a resumed step once more in its next micro-batch, nor at a validation between two, lets training that is told to stop (by
    EarlyStopping or `max_time`) finish its step first, and saves the last step when training ends.
    """

    _step, _is_within, _is_told_to_stop = 0, False, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._is_within, self._step = trainer.global_step == self._step, trainer.global_step
        self._stop_between_steps(trainer)
        if trainer.global_step != trainer.max_steps:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == trainer.max_steps:
            super().on_train_batch_end(trainer, pl_module, None, None, 0)
        super().on_train_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_within:
            super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_between_steps(trainer)

    def _stop_between_steps(self, trainer: Trainer) -> None:
        self._is_told_to_stop |= trainer.should_stop
        trainer.should_stop = self._is_told_to_stop and not self._is_within
