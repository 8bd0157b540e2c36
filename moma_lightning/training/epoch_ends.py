"""What Lightning does at the end of an epoch, once and only once, however often a training is stopped there."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.loop import _Loop


class EpochEnds(Callback):
    """A run that goes on ends no epoch twice, and makes up for a validation that was cut off.

    From a checkpoint of a finished epoch, where only `max_steps` says how long to train, Lightning goes through that epoch's end again, without its
    validation: callbacks that monitor a metric fail, the epoch counts twice, and loggers are a step ahead from then on. From one that was written
    in an epoch's last step, before its validation, it leaves that out for good.

    owed: whether validation is due after the step that was trained last.
    """

    def __init__(self) -> None:
        self.owed = False

    def state_dict(self) -> dict[str, Any]:
        return {"owed": self.owed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.owed = state_dict["owed"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop
        is_last_batch = loop.epoch_loop.batch_progress.current.completed >= trainer.num_training_batches
        if loop.restarting and loop.epoch_loop.restarted_on_last and is_last_batch:
            _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]  # the loop's own setter overrules it
        if self.owed:
            validation, connector = loop.epoch_loop.val_loop, trainer._logger_connector
            first, validation.restarting = connector._first_loop_iter, False
            trainer.validating = True
            validation.run()
            trainer.training = True
            connector._first_loop_iter = first

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        self.owed = trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.owed = False
