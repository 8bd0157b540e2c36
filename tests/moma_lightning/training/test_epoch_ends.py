"""Trainings that are stopped anywhere and go on: the same epochs, validations and log as of one that was not."""

import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, model_checkpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from moma_lightning.training.epoch_ends import EpochEnds
from moma_lightning.training.guards import Preempted, StopOnSignal
from moma_lightning.training.step_checkpoint import StepCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore")
BATCHES = 4


class Counter(LightningModule):
    """Its weight is the number of its steps, and its score lowest at step 9. Writes down what happens: (what, epoch, step)."""

    def __init__(self):
        super().__init__()
        self.weight, self.events = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.events.append(("train", self.current_epoch, self.global_step))
        self.log("train/loss", self.weight.detach())
        return -self.weight

    def validation_step(self, batch, batch_idx):
        self.events.append(("validate", self.current_epoch, self.global_step))
        self.log("val/score", (self.weight.detach() - 9) ** 2)

    def on_train_epoch_end(self):
        self.events.append(("end", self.current_epoch, self.global_step))

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], 1.0)


class Data(LightningDataModule):
    """Goes on within an epoch."""

    def __init__(self):
        super().__init__()
        self.given = self.first = 0

    def train_dataloader(self):
        return SimpleLoader(self)

    def val_dataloader(self):
        return DataLoader([0.0])

    def state_dict(self):
        return {"given": self.given % BATCHES}

    def load_state_dict(self, state_dict):
        self.given = self.first = state_dict["given"]


class SimpleLoader:
    def __init__(self, data: Data):
        self.data = data

    def __len__(self):
        return BATCHES

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass

    def __iter__(self):
        self.data.given, self.data.first = self.data.first, 0
        for number in range(self.data.given, BATCHES):
            self.data.given += 1
            yield float(number)


class StopBehind(StopOnSignal):
    """As if a signal had come in this step."""

    def __init__(self, step: int, last):
        super().__init__(last)
        self.step = step

    def _is_agreed(self, trainer: Trainer) -> bool:
        return trainer.global_step == self.step


class Log(DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((sorted(set(metrics) - {"epoch"}), int(metrics["epoch"]), step))


def fit(folder, steps: int = 12, told_at: int = 0, resume: bool = False, callbacks=(), checkpoint=None, **options) -> SimpleNamespace:
    path, module, log = folder / "last.ckpt", Counter(), Log()
    saver = StepCheckpoint(folder / "saved", **({"save_top_k": 0, "every_n_train_steps": 100} | (checkpoint or {})))
    callbacks = [*callbacks, EpochEnds(), StopBehind(told_at, path), saver]
    trainer = Trainer(accelerator="cpu", max_steps=steps, logger=log, log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
                      default_root_dir=folder, callbacks=callbacks, **({"num_sanity_val_steps": 0} | options))
    try:
        trainer.fit(module, Data(), ckpt_path=path if resume else None)
        trainer.save_checkpoint(path)
    except Preempted:
        pass
    return SimpleNamespace(events=module.events, rows=log.rows, epoch=trainer.current_epoch, step=trainer.global_step, weight=float(module.weight.detach()))


SCHEDULES = {"each epoch": {}, "every other": {"check_val_every_n_epoch": 2}, "twice an epoch": {"val_check_interval": 2},
             "across epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None}, "never": {"limit_val_batches": 0}}


def at_every_step(test):
    return pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)(pytest.mark.parametrize("step", range(1, 12))(test))


@at_every_step
def test_told_to_stop_behind_any_step(tmp_path, step, options):
    whole = fit(tmp_path / "whole", **options)
    first, then = fit(tmp_path, told_at=step, **options), fit(tmp_path, resume=True, **options)
    assert first.step == step and first.events + then.events == whole.events and (then.epoch, then.weight) == (3, 12.0)
    assert first.rows + then.rows == whole.rows


@at_every_step
def test_ended_behind_any_step_and_taken_further(tmp_path, step, options):
    whole, first, then = fit(tmp_path / "whole", **options), fit(tmp_path, steps=step, **options), fit(tmp_path, resume=True, **options)
    ends_there = [] if step % BATCHES == 0 else [("end", step // BATCHES, step)]  # training ended in the middle of this epoch
    assert first.events + then.events == [*first.events, *whole.events[len(first.events) - len(ends_there) :]]
    assert (then.epoch, then.weight) == (3, 12.0) and first.rows + then.rows == whole.rows


def stop_early():
    return EarlyStopping("val/score", patience=1)


@pytest.mark.parametrize("step", range(3, 13))
def test_what_hangs_on_an_epochs_end_happens(tmp_path, step):
    """EarlyStopping and the best checkpoint look at the metric there: 25, 1, 9 at steps 4, 8, 12."""

    def best(folder):
        return ModelCheckpoint(folder, "best-{step}", monitor="val/score")

    fit(tmp_path, 40, told_at=step, callbacks=[stop_early(), best(tmp_path / "best")])
    then = fit(tmp_path, 40, resume=True, callbacks=[stop_early(), best(tmp_path / "best")])
    assert then.step == 12 and [path.name for path in (tmp_path / "best").iterdir()] == ["best-step=8.ckpt"]


@pytest.mark.parametrize("on_train_epoch_end", [True, False])
def test_a_checkpoint_of_an_epochs_end_goes_on_with_the_next(tmp_path, on_train_epoch_end):
    kept = {"every_n_train_steps": 0, "every_n_epochs": 1, "save_top_k": 1, "save_on_train_epoch_end": on_train_epoch_end, "filename": "kept"}
    whole = fit(tmp_path / "whole")
    fit(tmp_path, 4, checkpoint=kept)
    (tmp_path / "saved/kept.ckpt").replace(tmp_path / "last.ckpt")
    then = fit(tmp_path, resume=True)
    assert [event for event in then.events if event[0] == "end" and event[2] > 4] == [("end", 1, 8), ("end", 2, 12)]
    assert then.epoch == whole.epoch == 3


@pytest.mark.parametrize("checkpoint, names", [
    ({"save_top_k": -1, "every_n_train_steps": 4}, {"step=4", "step=8"}), ({"save_top_k": 1, "every_n_train_steps": 4, "monitor": "val/score"}, {"step=8"}),
    ({"save_top_k": -1, "every_n_train_steps": 0, "every_n_epochs": 2, "monitor": "val/score"}, {"step=8"}),
])
def test_the_last_step_is_among_those_that_are_kept_with_its_own_score(tmp_path, checkpoint, names):
    fit(tmp_path, 8, checkpoint=checkpoint | {"filename": "{step}"})
    assert {path.stem for path in (tmp_path / "saved").iterdir()} == names


JUDGED = {"monitor": "val/score", "save_top_k": -1, "every_n_train_steps": 2, "save_last": True, "filename": "{step}", "enable_version_counter": False}


def loaded(path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("step", [4, 8])
def test_a_best_of_a_validation_that_was_made_up_for_goes_on_as_any(tmp_path, step):
    whole = fit(tmp_path / "whole")
    fit(tmp_path, told_at=step, checkpoint=JUDGED)
    then = fit(tmp_path, resume=True, checkpoint=JUDGED)
    assert then.events == whole.events[-len(then.events) :]
    (tmp_path / f"saved/step={step}.ckpt").replace(tmp_path / "last.ckpt")
    again = fit(tmp_path, resume=True)
    assert [event for event in again.events if event[2] > step] == [event for event in whole.events if event[2] > step] and again.epoch == 3


def test_no_link_is_left_to_a_best_that_went(tmp_path):
    """Scores 25, 1, 9, 49 of which the highest is the best: the second finds the first better, the fourth takes its place."""
    fit(tmp_path, 18, told_at=17, checkpoint=JUDGED | {"mode": "max", "save_top_k": 1, "save_last": "link", "every_n_train_steps": 100})
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["step=16.ckpt"]


@pytest.mark.parametrize("options, validated", [({}, [4, 8, 12]), ({"val_check_interval": 3}, [3, 7, 11]), ({"val_check_interval": 1}, range(1, 13))])
def test_each_validation_judges_its_own_weights_and_they_go_on(tmp_path, options, validated):
    whole = fit(tmp_path, checkpoint=JUDGED, **options)
    saver = next(state for name, state in loaded(tmp_path / "last.ckpt")["callbacks"].items() if name.startswith("StepCheckpoint"))
    scores = {int(loaded(path)["state_dict"]["weight"]): (path, float(score)) for path, score in saver["best_k_models"].items()}
    assert {step: score for step, (_, score) in scores.items()} == {step: (step - 9) ** 2 for step in validated}
    for step, (path, _) in scores.items():
        Path(path).replace(tmp_path / "last.ckpt")
        then = fit(tmp_path, resume=True, **options)
        assert [event for event in then.events if event[2] > step] == [event for event in whole.events if event[2] > step] and then.weight == 12


@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("often, steps", [({"every_n_train_steps": 2}, [2, 4, 6, 12]),
                                          ({"every_n_train_steps": 0, "train_time_interval": timedelta(0)}, [3, 5, 7, 12])])
def test_steps_between_validations_save_the_last_alone_and_it_goes_on(tmp_path, often, steps, save_last):
    """Killed before a first validation, behind one that ended an epoch, before the first of a run that goes on, and not any more."""
    found, last = [], tmp_path / "saved/last.ckpt"
    for told_at in (4, 6, 8, 13):
        fit(tmp_path, told_at=told_at, resume=told_at > 4, callbacks=[stop_early()], checkpoint=JUDGED | often | {"save_last": save_last})
        shutil.copy(last, tmp_path / "last.ckpt")  # in place of what a signal has saved
        found.append((loaded(last)["global_step"], {path.stem for path in last.parent.iterdir()} - {"last"}))
    assert found == list(zip(steps, [set(), {"step=4"}, {"step=4"}, {"step=4", "step=8", "step=12"}], strict=True))


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2, "val_check_interval": 3, "limit_val_batches": 1}, {"num_sanity_val_steps": 1},
                                     {"fast_dev_run": True}])
@pytest.mark.parametrize("kept", [{"every_n_train_steps": 0, "every_n_epochs": 1, "save_top_k": -1, "save_on_train_epoch_end": False},
                                  JUDGED | {"save_last": False}])
def test_nothing_is_saved_at_a_validation_between_two_micro_batches_nor_in_a_check(tmp_path, kept, options):
    fit(tmp_path, 2, checkpoint=kept, **options)
    assert not list((tmp_path / "saved").glob("*.ckpt"))


@pytest.mark.parametrize("monitor", [None, "val/score"])
def test_an_interval_that_ends_between_two_micro_batches_is_waited_for(tmp_path, monkeypatch, monitor):
    saved, seconds = [], []  # a batch takes one
    monkeypatch.setattr(Counter, "on_train_batch_start", lambda *_: seconds.append(1))
    monkeypatch.setattr(model_checkpoint, "time", SimpleNamespace(monotonic=lambda: len(seconds)))
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda *_: saved.append(len(seconds)))
    interval = {"every_n_train_steps": 0, "train_time_interval": timedelta(seconds=3), "save_last": True, "monitor": monitor}
    fit(tmp_path, 4, accumulate_grad_batches=2, checkpoint=interval)
    assert saved == [4, 8, 8]
