"""What Lightning does at the end of an epoch, done once, wherever a training is stopped and goes on."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fit_loop import RestartStage
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer import call


class EpochEnds(Callback):
    """A run that goes on counts no epoch twice, and makes up for a validation that was cut off.

    Where only `max_steps` says how long to train, Lightning takes the last epoch of a training that has ended for over: in its middle it counts it
    once more when it goes on, and behind its last batch it ends it again, without its validation, so that callbacks that monitor a metric fail. From a
    checkpoint of an epoch's last step, written before its end, it leaves out the validation and all that hangs on the epoch's end. Either way loggers may
    be a step ahead from then on.

    owed: whether validation is due after the step that was trained last. is_epochs: whether that step was an epoch's last.
    """

    def __init__(self) -> None:
        self.owed = self.is_epochs = False
        self._uncounted = 0  # epochs that are over, while their end is made up for

    def state_dict(self) -> dict[str, Any]:
        return {"owed": self.owed, "is_epochs": self.is_epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.owed, self.is_epochs = state_dict["owed"], state_dict["is_epochs"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop
        epoch, trained = loop.epoch_progress, loop.epoch_loop.batch_progress.current.completed
        is_over = epoch.current.ready == epoch.current.started == epoch.current.processed == epoch.current.completed
        if loop.restarting and loop.epoch_loop.restarted_on_last and is_over:
            if trained >= trainer.num_training_batches:
                _Loop.restarting.fset(loop, False)  # the loop's own setter overrules it
            else:
                for counted in (epoch.current, epoch.total):
                    counted.processed, counted.completed = counted.processed - 1, counted.completed - 1
                loop._restart_stage = RestartStage.RESTARTED_MID_EPOCH
        self.is_epochs &= loop.epoch_loop.restarted_on_train_batch_end
        if self.owed or self.is_epochs:
            self._make_up(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step  # what loggers are told

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        self.owed = trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        self.is_epochs = loop.epoch_loop.batch_progress.is_last_batch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.owed = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._uncounted:  # by a validation that is made up for
            checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] += self._uncounted

    def _make_up(self, trainer: Trainer) -> None:
        """As `_TrainingEpochLoop.on_advance_end` validates and, where the epoch was over, `_FitLoop.on_advance_end` ends it."""
        loop, connector, epoch = trainer.fit_loop, trainer._logger_connector, trainer.fit_loop.epoch_progress.current
        first, loop.epoch_loop.val_loop.restarting = connector._first_loop_iter, False
        self._uncounted = int(self.is_epochs)
        epoch.completed -= self._uncounted  # Lightning has counted it
        if self.owed:
            trainer.validating = True
            loop.epoch_loop.val_loop.run()
            trainer.training = True
        connector._first_loop_iter = first
        if self.is_epochs:
            connector.epoch_end_reached()
            call._call_callback_hooks(trainer, "on_train_epoch_end", monitoring_callbacks=False)
            call._call_lightning_module_hook(trainer, "on_train_epoch_end")
            call._call_callback_hooks(trainer, "on_train_epoch_end", monitoring_callbacks=True)
            connector.on_epoch_end()
        epoch.completed += self._uncounted
        self._uncounted = 0
