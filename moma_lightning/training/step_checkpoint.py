"""When checkpoints are saved: between steps, never within one."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor


class StepCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that never saves between two micro-batches, whose gradients would be lost, nor before a last validation, which would be left out.

    So it does not save a resumed step once more in its next micro-batch, nor at a validation between two, lets training that is told to stop (by
    EarlyStopping or `max_time`) finish its step first, and saves the last step when training ends.

    Where a validation's metric is monitored (`val/`), each validation judges the weights that it is of, and steps in between save `last` alone. Lightning's
    saves these by the score of the validation before, and before a start's first validation it saves nothing. By `every_n_epochs` both are right.
    """

    _step, _is_within, _is_told_to_stop = 0, False, False
    _defer_save_until_validation: bool  # Lightning's: a save is due

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._is_within, self._step = trainer.global_step == self._step, trainer.global_step
        self._stop_between_steps(trainer)
        if not self._is_within and trainer.global_step != trainer.max_steps:
            self._save_step(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == trainer.max_steps:
            self._save_step(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_within and self._is_judged_by_validation:
            self._judge(trainer)
        elif not self._is_within:
            super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_between_steps(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_judged_by_validation:  # what a validation left alone is not linked to as the last
            super().on_train_epoch_end(trainer, pl_module)

    @property
    def _is_judged_by_validation(self) -> bool:
        return (self.monitor or "").startswith("val/") and not self._every_n_epochs

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        """Without the score of a validation that is over: Lightning's then only notes that a save is due."""
        is_over = self._is_judged_by_validation and not trainer.validating
        return {name: value for name, value in super()._monitor_candidates(trainer).items() if not (is_over and name == self.monitor)}

    def _save_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_batch_end(trainer, pl_module, None, None, 0)
        if self._is_judged_by_validation and self._defer_save_until_validation:
            self._defer_save_until_validation = False
            self._last_checkpoint_saved = ""  # `save_last: link` would be one to another step's
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _judge(self, trainer: Trainer) -> None:
        """The best alone: `last` is of a batch's end, from which `EpochEnds` makes up for the validation, so that its metrics are there again."""
        self._last_global_step_saved = -1  # what was saved in this step was `last`
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _stop_between_steps(self, trainer: Trainer) -> None:
        self._is_told_to_stop |= trainer.should_stop
        trainer.should_stop = self._is_told_to_stop and not self._is_within
