"""The share of time that training waits for data, by a clock that the test turns."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from moma_lightning.training import data_wait
from moma_lightning.training.data_wait import DataWait


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Loader:
    """Each batch takes the given seconds to come."""

    def __init__(self, clock: Clock, seconds: list[float]):
        self.clock, self.seconds, self.waited = clock, seconds, 0.0

    def __len__(self) -> int:
        return len(self.seconds)

    def __iter__(self):
        for seconds in self.seconds:
            self.clock.now += seconds
            self.waited += seconds
            yield torch.zeros(1)


class Busy(LightningModule):
    """Steps of 3 seconds, validations of 1,000; what was logged by its steps is noted."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock, self.weight, self.shares = clock, torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, index):
        self.clock.now += 3
        return self.weight.sum()

    def validation_step(self, batch, index):
        self.clock.now += 1000

    def on_train_batch_end(self, outputs, batch, index):
        if "train/data_wait" in self.trainer.callback_metrics:
            self.shares.append(float(self.trainer.callback_metrics["train/data_wait"]))

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], 1.0)


class SlowSaver(Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.lightning_module.clock.now += 500


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(data_wait, "time", clock)
    return clock


def fit(clock, folder, loader, **options) -> Busy:
    module = Busy(clock)
    trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=[DataWait(), SlowSaver()], logger=False, enable_progress_bar=False, enable_checkpointing=False,
                      enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder, val_check_interval=1, **options)  # fmt: skip
    trainer.fit(module, loader, DataLoader(torch.zeros(1)))
    return module


@pytest.mark.filterwarnings("ignore")
def test_it_is_the_wait_over_wait_and_step_of_the_last_logged_steps(clock, tmp_path):
    module = fit(clock, tmp_path, Loader(clock, [1, 0, 9]), log_every_n_steps=2)
    assert module.shares == pytest.approx([1 / 4, 1 / 7, 9 / 15, 10 / 16, 1 / 7, 9 / 15])


@pytest.mark.filterwarnings("ignore")
def test_other_loaders_are_not_told_of(clock, tmp_path):
    assert fit(clock, tmp_path, DataLoader(torch.zeros(3)), log_every_n_steps=2).shares == []
