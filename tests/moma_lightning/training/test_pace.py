"""How fast training goes and what share of its time it waits for data, by a clock that the test turns."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from moma_lightning.training import pace
from moma_lightning.training.pace import Pace


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Loader:
    """Each batch, of 4 samples, takes the given seconds to come."""

    def __init__(self, clock: Clock, seconds: list[float]):
        self.clock, self.seconds, self.waited = clock, seconds, 0.0

    def __len__(self) -> int:
        return len(self.seconds)

    def __iter__(self):
        for seconds in self.seconds:
            self.clock.now += seconds
            self.waited += seconds
            yield torch.zeros(4)


class Busy(LightningModule):
    """Steps of 3 seconds, validations of 1,000; what was logged by its steps is noted."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock, self.weight, self.shares = clock, torch.nn.Parameter(torch.zeros(1)), []
        self.rates = []

    def training_step(self, batch, index):
        self.clock.now += 3
        return self.weight.sum()

    def validation_step(self, batch, index):
        self.clock.now += 1000

    def on_train_batch_end(self, outputs, batch, index):
        for name, noted in (("train/data_wait", self.shares), ("train/samples_per_s", self.rates)):
            if name in self.trainer.callback_metrics:
                noted.append(float(self.trainer.callback_metrics[name]))

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], 1.0)


class SlowSaver(Callback):
    """Saves for 500 seconds after the fifth batch."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.epoch_loop.total_batch_idx == 4:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/a.ckpt")
            trainer.lightning_module.clock.now += 500


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def fit(clock, folder, loader, **options) -> Busy:
    module = Busy(clock)
    trainer = Trainer(accelerator="cpu", callbacks=[Pace(), SlowSaver()], logger=False, enable_progress_bar=False, enable_checkpointing=False,
                      enable_model_summary=False, num_sanity_val_steps=1, default_root_dir=folder, val_check_interval=2, **options)
    trainer.fit(module, loader, DataLoader(torch.zeros(1)))
    return module


@pytest.mark.filterwarnings("ignore")
def test_they_are_of_the_time_of_the_last_logged_steps(clock, tmp_path, monkeypatch):
    """Batches 2 and 4 come after a validation, 5 after a checkpoint: 0, 1, 3 count."""
    monkeypatch.setattr(Trainer, "world_size", 3)
    module = fit(clock, tmp_path, Loader(clock, [1, 0, 5, 9, 5, 5, 7]), max_epochs=1, log_every_n_steps=2)
    assert module.shares == pytest.approx([1 / 4, 1 / 7, 1 / 7, 9 / 15, 9 / 15, 9 / 15, 9 / 15])
    assert module.rates == pytest.approx([12 / 4, 24 / 7, 24 / 7, 24 / 15, 24 / 15, 24 / 15, 24 / 15])


@pytest.mark.filterwarnings("ignore")
def test_accumulated_batches_are_all_counted(clock, tmp_path):
    module = fit(clock, tmp_path, Loader(clock, [1, 0, 0, 0]), max_epochs=1, log_every_n_steps=1, accumulate_grad_batches=2, limit_val_batches=0)
    assert module.shares == pytest.approx([1 / 4, 1 / 7, 0, 0]) and module.rates == pytest.approx([4 / 4, 8 / 7, 8 / 6, 8 / 6])


@pytest.mark.filterwarnings("ignore")
def test_a_loader_that_begins_anew_does_not_count_backwards(clock, tmp_path):
    loaders = iter([Loader(clock, [6, 6]), Loader(clock, [1, 1])])
    module = Busy(clock)
    module.train_dataloader = lambda: next(loaders)
    trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=[Pace()], logger=False, enable_progress_bar=False, enable_checkpointing=False,
                      enable_model_summary=False, default_root_dir=tmp_path, reload_dataloaders_every_n_epochs=1, log_every_n_steps=1)
    trainer.fit(module)
    assert module.shares == pytest.approx([6 / 9, 6 / 9, 1 / 4, 1 / 4])


@pytest.mark.filterwarnings("ignore")
def test_no_number_is_made_a_gpus(clock, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(Busy, "log", lambda self, name, value, **options: logged.append(value))
    fit(clock, tmp_path, Loader(clock, [1, 1]), max_epochs=1)
    assert [type(value) for value in logged] == [torch.Tensor] * 4 and {value.device.type for value in logged} == {"cpu"}


@pytest.mark.filterwarnings("ignore")
def test_what_other_loaders_wait_is_not_told(clock, tmp_path):
    module = fit(clock, tmp_path, DataLoader(torch.zeros(6), batch_size=2), max_epochs=1)
    assert module.shares == [] and module.rates == pytest.approx([2 / 3, 2 / 3, 2 / 3])
