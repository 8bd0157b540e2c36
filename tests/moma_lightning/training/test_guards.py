"""Ends of a training: signals, numbers that are no numbers, full disks."""

import errno
import os
import random
import re
import signal
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch.utils.data import DataLoader

from moma_lightning.training import checkpoint_io
from moma_lightning.training.checkpoint_io import WholeCheckpointIO
from moma_lightning.training.guards import Preempted, StopOnNonFinite, StopOnSignal, ended_together
from moma_lightning.training.random_states import RandomStates, collect, restore
from moma_lightning.training.step_checkpoint import StepCheckpoint
from tests.moma_lightning.training.sharded_run import global_batch


class Poisoned(LightningModule):
    """Its loss is NaN at one step, or its weight infinite after another."""

    def __init__(self, nan_at: int = -1, inf_at: int = -1):
        super().__init__()
        self.nan_at, self.inf_at, self.weight = nan_at, inf_at, torch.nn.Parameter(torch.zeros(1))
        self.drawn = []

    def training_step(self, batch, index):
        self.drawn.append((torch.rand(()).item(), random.random(), float(np.random.rand())))  # noqa: NPY002
        factor = float("nan") if self.global_step == self.nan_at else float("inf") if self.global_step == self.inf_at else 1.0
        return (-self.weight * factor).sum() if self.global_step != self.inf_at else -(self.weight - self.weight.detach()).sum() * factor

    def validation_step(self, batch, index):
        torch.rand(5)

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], 1.0)


def fit(folder, module, *callbacks, steps=6, resume=None, validate=False, every=1, **options):
    saver = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=every)
    trainer = Trainer(accelerator="cpu", max_steps=steps, callbacks=[*callbacks, saver], logger=False, enable_progress_bar=False,
                      enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder, plugins=[WholeCheckpointIO()], **options)
    data = DataLoader([global_batch(seed, 0, 1) for seed in range(6)], batch_size=None)
    trainer.fit(module, data, DataLoader(torch.zeros(1)) if validate else None, ckpt_path=resume)
    return trainer


def saved(folder) -> dict:
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore")
def test_a_nan_loss_stops_names_the_samples_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss is nan after step 4 on rank 0. Samples of the batch: 3-0, 3-1, 3-2, 3-3\.") as error:
        fit(tmp_path, Poisoned(nan_at=3), StopOnNonFinite())
    ways = re.findall(r"--([\w.]+)", str(error.value))
    assert ways == ["model.init_args.optimizer.lr", "data.init_args.config.seed", "ckpt_path", "checkpoint.save_top_k"]
    assert saved(tmp_path)["global_step"] == 3 and torch.isfinite(saved(tmp_path)["state_dict"]["weight"]).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [6, 4])
def test_without_a_checkpoint_a_nan_loss_stops_a_step_later_or_at_the_end(tmp_path, steps):
    """It names the step and the samples of the loss, not those that came after."""
    module = Poisoned(nan_at=3)
    with pytest.raises(FloatingPointError, match=r"the loss is nan after step 4 on rank 0. Samples of the batch: 3-0, 3-1, 3-2, 3-3\."):
        fit(tmp_path, module, StopOnNonFinite(), steps=steps, every=100)
    assert len(module.drawn) == min(5, steps)
    assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_nan_loss_stops_before_validation(tmp_path):
    module = Poisoned(nan_at=1)
    module.validation_step = lambda *_: pytest.fail("validated")
    with pytest.raises(FloatingPointError, match="the loss is nan after step 2"):
        fit(tmp_path, module, StopOnNonFinite(), validate=True, val_check_interval=2, every=100)


def test_a_loss_is_not_read_in_its_own_step():
    """Reading waits for the GPU. A tensor without data, which cannot be read, stands for one that is not computed yet."""
    guard, trainer, module = StopOnNonFinite(), Mock(spec=Trainer, global_step=1, global_rank=0), Poisoned()
    guard.on_train_batch_end(trainer, module, {"loss": torch.empty((), device="meta")}, None, 0)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        guard.on_train_batch_end(trainer, module, {"loss": torch.zeros(())}, None, 1)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_not_finite_never_reach_a_checkpoint(tmp_path):
    """A gradient may overflow where the loss, 0 * inf aside, does not show it before the next step."""
    module = Poisoned()
    module.on_after_backward = lambda: module.weight.grad.fill_(float("inf")) if module.global_step == 2 else None
    with pytest.raises(FloatingPointError, match="weight is not finite after step 3 on rank 0. Samples of the batch: 2-0, 2-1"):
        fit(tmp_path, module, StopOnNonFinite())
    assert saved(tmp_path)["global_step"] == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits(tmp_path, number):
    module, before = Poisoned(), signal.getsignal(number)
    module.on_before_optimizer_step = lambda _: os.kill(os.getpid(), number) if module.global_step == 2 else None
    with pytest.raises(Preempted) as stop:
        fit(tmp_path, module, StopOnSignal(tmp_path / "preempted.ckpt"))
    assert stop.value.code == 128 + number
    assert torch.load(tmp_path / "preempted.ckpt", weights_only=True)["global_step"] == 3
    assert signal.getsignal(number) == before


def test_ranks_agree_a_step_after_one_of_them_was_told(tmp_path, monkeypatch):
    """Rank 0 of two, of which the other one is told to end in step 2: nobody reads the answer of a step within it."""
    saved_at, told = [], iter([0, 1, 0])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor.fill_(next(told)))
    trainer = Mock(spec=Trainer, world_size=2, strategy=Mock(root_device=torch.device("cpu")), _logger_connector=Mock())
    trainer.save_checkpoint = lambda _: saved_at.append(trainer.global_step)
    stop = StopOnSignal(tmp_path / "last.ckpt")

    def train(step):
        trainer.global_step = step
        stop.on_train_batch_end(trainer, Poisoned(), None, None, step)

    train(1)
    train(2)
    with pytest.raises(Preempted):
        train(3)
    assert saved_at == [3]


def test_lightnings_own_agreement_makes_no_rank_wait_for_its_gpu(tmp_path):
    stop, loop = StopOnSignal(tmp_path / "last.ckpt"), Mock()
    loop.epoch_loop._broadcast_sigterm_tensor = lambda: pytest.fail("waited")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        stop.on_train_start(Mock(spec=Trainer, global_step=0, received_sigterm=False, fit_loop=loop), Poisoned())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor"), "Lightning calls it otherwise now: look whether it still waits"
    loop.epoch_loop._broadcast_sigterm_tensor()


@pytest.mark.filterwarnings("ignore")
def test_a_signal_before_training_saves_the_first_whole_step(tmp_path):
    """Lightning's own handler takes it, and would end after the first of the step's batches."""
    module, early = Poisoned(), Callback()
    early.on_train_start = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Lightning's handler calls the one before: Ray's, where another test has left it
    try:
        with pytest.raises(Preempted) as stop:
            fit(tmp_path, module, early, StopOnSignal(tmp_path / "last.ckpt"), accumulate_grad_batches=3, every=100)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 143 and saved(tmp_path)["global_step"] == 1 and len(module.drawn) == 3


@pytest.mark.parametrize("environment, rank, code", [(LightningEnvironment, 0, 143), (LightningEnvironment, 1, 0), (TorchElasticEnvironment, 1, 143)])
def test_what_lightnings_launcher_started_exits_with_0(tmp_path, environment, rank, code):
    """It kills the first process where another one's exit code is not."""
    strategy = Mock(cluster_environment=Mock(spec=environment))
    stop = StopOnSignal(tmp_path / "last.ckpt")
    stop.requested = signal.SIGTERM
    trainer = Mock(spec=Trainer, world_size=1, global_step=1, local_rank=rank, strategy=strategy, _logger_connector=Mock())
    with pytest.raises(Preempted) as raised:
        stop.on_train_batch_end(trainer, Poisoned(), None, None, 0)
    assert raised.value.code == code


@pytest.mark.parametrize("error, killed", [(OSError("disk full"), [signal.SIGKILL]), (KeyboardInterrupt(), [signal.SIGKILL]), (Preempted(143), [])])
def test_where_the_first_process_fails_the_others_do_not_wait(error, killed):
    told = []
    trainer = Mock(spec=Trainer, strategy=Mock(launcher=Mock(kill=told.append)))
    with pytest.raises(type(error)), ended_together(trainer):
        raise error
    assert told == killed
    with ended_together(trainer):
        pass
    assert told == killed


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_saves_nothing_within_an_accumulation(tmp_path):
    fit(tmp_path, Poisoned(), steps=1)
    saver, module, at = StepCheckpoint(tmp_path / "again", save_last=True, save_top_k=0, every_n_train_steps=1), Poisoned(), []
    module.on_save_checkpoint = lambda checkpoint: at.append((checkpoint["global_step"], len(module.drawn)))
    trainer = Trainer(accelerator="cpu", max_steps=4, callbacks=[saver], logger=False, enable_progress_bar=False, enable_model_summary=False,
                      accumulate_grad_batches=2, default_root_dir=tmp_path)
    trainer.fit(module, DataLoader([global_batch(seed, 0, 1) for seed in range(8)], batch_size=None), ckpt_path=tmp_path / "last.ckpt")
    assert [step for step, _ in at] == [2, 3, 4], "and not step 1 again, after the first batch of step 2"


@pytest.mark.filterwarnings("ignore")
def test_a_signal_waits_for_accumulated_gradients(tmp_path):
    module = Poisoned()
    module.on_before_zero_grad = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted):
        fit(tmp_path, module, StopOnSignal(tmp_path / "last.ckpt"), accumulate_grad_batches=3)
    assert saved(tmp_path)["global_step"] == 1 and len(module.drawn) == 3


@pytest.mark.filterwarnings("ignore")
def test_a_full_disk_keeps_the_checkpoint_from_before(tmp_path, monkeypatch):
    write = torch.save

    def full(checkpoint, path):
        if checkpoint["global_step"] == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(checkpoint, path)

    monkeypatch.setattr(checkpoint_io.torch, "save", full)
    with pytest.raises(OSError, match=r"last\.ckpt was not written \(No space left on device\); a file of that name from before is unchanged"):
        fit(tmp_path, Poisoned())
    assert saved(tmp_path)["global_step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_leftovers_of_a_killed_process_go(tmp_path):
    (tmp_path / ".last.12345.ckpt").write_bytes(b"half")
    WholeCheckpointIO().save_checkpoint({"global_step": 1}, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.filterwarnings("ignore")
def test_random_numbers_go_on_after_a_resume_and_do_not_feel_validation(tmp_path):
    def drawn(folder, steps, resume=None, **options):
        module = Poisoned()
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
        fit(folder, module, RandomStates(), steps=steps, resume=resume, **options)
        return module.drawn

    whole = drawn(tmp_path / "a", 6)
    assert drawn(tmp_path / "b", 6, validate=True, val_check_interval=2) == whole
    first = drawn(tmp_path / "c", 3)
    torch.manual_seed(9)
    assert first + drawn(tmp_path / "c", 6, tmp_path / "c/last.ckpt") == whole


def test_another_number_of_ranks_draws_anew_and_says_so():
    states = RandomStates()
    states.state = collect(torch.device("cpu"))
    two = {"ranks": states.state_dict()["ranks"] * 2}
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="the checkpoint is of 2 processes and these are 1"):
        states.load_state_dict(two)
    assert states.state is None
    first = torch.rand(3)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="of 2 processes"):
        states.load_state_dict(two)
    assert torch.equal(torch.rand(3), first), "the same on every restart"


def test_collected_states_are_restored():
    state = collect(torch.device("cpu"))
    first = torch.rand(2), random.random(), np.random.rand()  # noqa: NPY002
    restore(state)
    assert torch.equal(torch.rand(2), first[0]) and (random.random(), np.random.rand()) == first[1:]  # noqa: NPY002
