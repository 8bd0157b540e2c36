"""The command line on a module of one weight: config, loggers, checkpoints, going on after a kill."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from moma_lightning import __main__ as entry
from moma_lightning.cli import MoMACLI
from moma_lightning.digests import identity
from moma_lightning.training.data_wait import DataWait
from moma_lightning.training.loggers import run_loggers
from moma_lightning.training.run import Run
from tests.forked import Forked

ROOT = Path(__file__).parents[2]


class OneWeight(LightningModule):
    """Each step adds 1 to the weight: its value tells how many steps were trained."""

    def __init__(self, slope: float = 1.0, die_at: int = -1, die_in_validation: bool = False, echo: str = "", strict: str = "one",
                 raise_at: int = -1):  # fmt: skip
        super().__init__()
        self.raise_at = raise_at
        self.slope, self.die_at, self.die_in_validation, self.echo, self.strict = slope, die_at, die_in_validation, echo, strict
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def on_load_checkpoint(self, checkpoint):
        if self.strict != "one":
            raise ValueError("was trained with other options")

    def validation_step(self, batch, batch_idx):
        if self.die_in_validation and not self.trainer.sanity_checking:
            os._exit(9)
        self.log("val/weight", self.weight.detach())

    def training_step(self, batch, batch_idx):
        if self.global_step == self.die_at:
            os._exit(9)
        if self.global_step == self.raise_at:
            raise RuntimeError("cut")
        self.log("train/loss", self.weight.detach())
        return -self.slope * self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Numbers(LightningDataModule):
    """Training and validation of the same few numbers."""

    def __init__(self, count: int = 8):
        super().__init__()
        self.count = count

    def train_dataloader(self):
        return DataLoader(torch.arange(float(self.count)).tolist(), batch_size=1)

    val_dataloader = train_dataloader


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that writes a config and runs `fit` in this process; returns the CLI. wandb forgets its mode afterwards."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)

    def fit(*extra: str, **trainer) -> MoMACLI:
        monkeypatch.setattr(sys, "argv", ["moma_lightning", "fit", "--config", str(config(tmp_path, **trainer)), *extra])
        return MoMACLI()

    yield fit
    wandb.finish()
    wandb.teardown()


def config(folder, **trainer):
    path = folder / "stage.yaml"
    path.write_text(yaml.safe_dump({
        "trainer": {"default_root_dir": str(folder / "runs/tiny/stage1"), "max_steps": 5, "accelerator": "cpu", "log_every_n_steps": 1,
                    "enable_progress_bar": False, "enable_model_summary": False} | trainer,
        "checkpoint": {"every_n_train_steps": 2},
        "model": {"class_path": f"{__name__}.OneWeight"},
        "data": {"class_path": f"{__name__}.Numbers", "init_args": {"count": 8}},
    }))
    return path


def last_step(folder) -> int:
    return torch.load(folder / "runs/tiny/stage1/checkpoints/last.ckpt", weights_only=True)["global_step"]


def logged_steps(folder) -> list[int]:
    with (folder / "runs/tiny/stage1/metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


def validated_steps(folder) -> list[int]:
    with (folder / "runs/tiny/stage1/metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["val/weight"]]


def test_a_run_leaves_config_metrics_and_the_last_step(run, tmp_path):
    trainer = run("--model.slope", "2.0").trainer
    assert sum(isinstance(callback, DataWait) for callback in trainer.callbacks) == 1
    folder = tmp_path / "runs/tiny/stage1"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["init_args"]["slope"] == 2.0 and saved["seed_everything"] == 0
    assert logged_steps(tmp_path) == [0, 1, 2, 3, 4]
    assert last_step(tmp_path) == 5, "the last step is kept though it is no multiple of every_n_train_steps"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_finished_run_says_so_and_is_left_alone(run, tmp_path, caplog):
    run()
    before = (tmp_path / "runs/tiny/stage1/checkpoints/last.ckpt").stat().st_mtime_ns
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 0 and "training is complete" in caplog.text
    assert (tmp_path / "runs/tiny/stage1/checkpoints/last.ckpt").stat().st_mtime_ns == before


def test_a_finished_run_with_other_settings_is_no_answer_to_these(run, tmp_path):
    run()
    with pytest.raises(SystemExit, match=r"other settings than these \(model.init_args.slope 2.0, it was 1.0; data.init_args.count 7, it was 8\)"):
        run("--model.slope", "2.0", "--data.count", "7")
    with pytest.raises(SystemExit, match=r"seed_everything 1, it was 0"):
        run("--seed_everything", "1")
    with pytest.raises(SystemExit) as stop:
        run("--trainer.log_every_n_steps", "3")
    assert stop.value.code == 0


def test_a_finished_stage_2_is_not_taken_for_one_of_a_new_stage_1(tmp_path):
    decoder, run = tmp_path / "decoder", Run(tmp_path / "stage2")
    run.folder.mkdir()
    decoder.mkdir()
    (decoder / "model.safetensors").write_bytes(b"first")
    told = {"model": {"init_args": {"decoder": str(decoder)}}}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(told))
    run.mark_finished(10, {}, identity(str(decoder)))
    assert run.changed(told) == []
    settings = {"num_workers": 4, "val": "b.tar", "flip": False}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(told | {"data": {"init_args": {"config": settings | {"num_workers": 0, "val": "a.tar"}}}}))
    assert run.changed(told | {"data": {"init_args": {"config": settings}}}) == [], "neither moves what is trained"
    moved = run.changed(told | {"data": {"init_args": {"config": settings | {"flip": True}}}})
    assert moved == ["data.init_args.config.flip True, it was False"]
    (decoder / "model.safetensors").write_bytes(b"second")
    assert run.changed(told) == [f"model.init_args.decoder {str(decoder)!r} holds other weights now"]
    shutil.rmtree(decoder)
    assert run.changed(told) == [], "it is needed no longer"


def test_a_refused_run_does_not_change_what_is_known_of_the_finished_one(run, tmp_path):
    run()
    with pytest.raises(ValueError, match="was trained with other options"):
        run("--model.strict", "other", "--trainer.max_steps", "9")
    with pytest.raises(SystemExit, match="model.init_args.strict 'other', it was 'one'"):
        run("--model.strict", "other")
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 0


@pytest.mark.parametrize("option, value", [("accumulate_grad_batches", "2"), ("gradient_clip_val", "0.5"), ("precision", "bf16-mixed")])
def test_how_it_was_trained_is_a_setting_too(run, option, value):
    run()
    with pytest.raises(SystemExit, match=rf"other settings than these \(trainer.{option} "):
        run(f"--trainer.{option}", value)


def test_a_run_that_goes_on_with_other_settings_says_so(run, tmp_path):
    run()
    with pytest.warns(UserWarning, match=r"goes on with other settings than before \(model.init_args.slope 2.0, it was 1.0\)"):
        run("--model.slope", "2.0", max_steps=6)


def test_a_run_by_epochs_or_stopped_early_is_finished(run, tmp_path):
    run(max_steps=-1, max_epochs=1)
    with pytest.raises(SystemExit) as stop:
        run(max_steps=-1, max_epochs=1)
    assert stop.value.code == 0
    with pytest.raises(SystemExit, match="slope 2.0, it was 1.0"):
        run("--model.slope", "2.0", max_steps=-1, max_epochs=1)
    run(max_steps=-1, max_epochs=2)
    assert last_step(tmp_path) == 16


def early_stopping(metric: str, **options) -> dict:
    return {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": metric} | options}


def test_a_run_that_stopped_early_is_finished(run, tmp_path):
    stop_at_once = {"max_steps": 40, "callbacks": [early_stopping("val/weight", patience=1, mode="min")]}
    run(**stop_at_once)
    assert last_step(tmp_path) == 16
    with pytest.raises(SystemExit) as stop:
        run(**stop_at_once)
    assert stop.value.code == 0


def test_an_epoch_that_has_ended_does_not_end_again(run, tmp_path):
    """EarlyStopping would find no metric, the log would be a step ahead, the epoch count one."""
    watched = {"callbacks": [early_stopping("val/weight", patience=9)]}
    run(max_steps=8, **watched)
    cli = run(max_steps=16, **watched)
    assert logged_steps(tmp_path) == list(range(16)) and cli.trainer.current_epoch == 2
    assert validated_steps(tmp_path) == [7, 15]


def test_training_that_is_told_to_stop_finishes_its_step(run, tmp_path):
    """Five batches are two and a half windows of two; a quarter of an epoch is two batches."""
    options = {"max_steps": 40, "accumulate_grad_batches": 4, "val_check_interval": 2, "callbacks": [early_stopping("val/weight", patience=0, mode="min")]}
    cli = run(**options)
    assert last_step(tmp_path) == 1 and cli.trainer.fit_loop.epoch_loop.batch_progress.current.completed == 4


def test_a_bar_and_a_monitor_of_ones_own_stay_alone(run):
    own = [{"class_path": f"lightning.pytorch.callbacks.{name}"} for name in ("TQDMProgressBar", "LearningRateMonitor")]
    kinds = [type(callback).__name__ for callback in run(max_steps=1, enable_progress_bar=True, callbacks=own).trainer.callbacks]
    assert "RichProgressBar" not in kinds and kinds.count("LearningRateMonitor") == 1


def test_a_run_without_checkpoints_is_refused(run):
    with pytest.raises(SystemExit, match="enable_checkpointing is false"):
        run(enable_checkpointing=False)


@pytest.mark.parametrize("option", ["save_weights_only", "save_on_exception"])
def test_checkpoints_that_no_run_goes_on_from_are_refused(run, option):
    with pytest.raises(SystemExit, match="no training goes on from"):
        run(f"--checkpoint.{option}", "true")


def test_a_run_that_began_from_another_checkpoint_goes_on_from_its_own(run, tmp_path, caplog):
    """As where a job is put back into the queue with its command."""
    run()
    other = str(shutil.copy(tmp_path / "runs/tiny/stage1/checkpoints/last.ckpt", tmp_path / "other.ckpt"))
    mine = ["--trainer.default_root_dir", str(tmp_path / "mine"), "--ckpt_path", other]
    with caplog.at_level("INFO"):
        run(*mine, max_steps=7)
        run(*mine, max_steps=9)
        with pytest.raises(SystemExit) as stop:
            run(*mine, max_steps=9)
    assert stop.value.code == 0 and f"of the run that began from {other}" in caplog.text
    with (tmp_path / "mine/metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]] == [5, 6, 7, 8]
    run("--trainer.default_root_dir", str(tmp_path / "mine"), "--ckpt_path", str(tmp_path / "runs/tiny/stage1/checkpoints/last.ckpt"), max_steps=6)
    assert torch.load(tmp_path / "mine/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6, "another one is begun from"


def test_a_training_that_began_elsewhere_is_not_finished_by_what_was_there(run, tmp_path):
    """Cut off behind its first checkpoint, in the folder of a finished one with as many steps."""
    run(max_steps=3)
    other = str(shutil.copy(tmp_path / "runs/tiny/stage1/checkpoints/last.ckpt", tmp_path / "other.ckpt"))
    run(max_steps=8)
    with pytest.raises(RuntimeError, match="cut"):
        run("--ckpt_path", other, "--model.raise_at", "7", max_steps=8)
    assert last_step(tmp_path) == 6
    run("--ckpt_path", other, max_steps=8)
    assert last_step(tmp_path) == 8


def test_a_damaged_last_checkpoint_is_left_by_naming_another(run, tmp_path):
    run(max_steps=3)
    last = tmp_path / "runs/tiny/stage1/checkpoints/last.ckpt"
    other = str(shutil.copy(last, tmp_path / "other.ckpt"))
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match="--ckpt_path"):
        run(max_steps=5)
    with pytest.warns(UserWarning, match=f"Training begins from {other}"):
        run("--ckpt_path", other, max_steps=5)
    assert last_step(tmp_path) == 5


def test_a_folder_that_another_process_trains_in_is_refused(run, tmp_path):
    hold = "import sys, pathlib; from moma_lightning.training.run import Run; a = Run(pathlib.Path(sys.argv[1])); a.hold(); print('held', flush=True); input()"
    folder = tmp_path / "runs/tiny/stage1"
    with subprocess.Popen([sys.executable, "-c", hold, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SystemExit, match=rf"another process trains here \(.*, process {other.pid}, since "):
            run()
        other.kill()
    run()
    assert last_step(tmp_path) == 5


def test_with_a_logger_of_ones_own_the_config_is_in_the_runs_folder(run, tmp_path):
    run(logger={"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "elsewhere")}})
    assert [path.parent for path in tmp_path.rglob("config.yaml")] == [tmp_path / "runs/tiny/stage1"]


@pytest.mark.parametrize("before, now, told", [
    ({"lora": None}, {"lora": {"rank": 4}}, ["lora is set, it was None"]),
    ({"lora": {"rank": 4}}, {"lora": None}, ["lora None, it was set"]),
    ({"optimizer": {"lr_multipliers": {}}}, {"optimizer": {"lr_multipliers": {"a": 0.1}}}, ["optimizer.lr_multipliers {'a': 0.1}, it was {}"]),
    ({"optimizer": {"lr_multipliers": {"a": 1, r"b\.": 2}}}, {"optimizer": {"lr_multipliers": {"a": 1}}},
     [r"optimizer.lr_multipliers {'a': 1}, it was {'a': 1, 'b\\.': 2}"]),
    ({"old": 1, "same": {"a": [1]}}, {"new": 2, "same": {"a": [1]}}, []),  # of an older version
])  # fmt: skip
def test_sections_and_tables_of_settings_are_compared(tmp_path, before, now, told):
    run = Run(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": before}))
    assert run.changed({"model": now}) == [f"model.{each}" for each in told]


def test_checkpoints_by_epochs_that_keep_none_are_refused(run):
    with pytest.raises(SystemExit, match="writes nothing to go on from"):
        run("--checkpoint.every_n_train_steps", "0", "--checkpoint.every_n_epochs", "1")
    run("--checkpoint.every_n_train_steps", "0", "--checkpoint.every_n_epochs", "1", "--checkpoint.save_top_k", "1", max_steps=1)


def test_more_steps_go_on_from_a_finished_run(run, tmp_path):
    run()
    cli = run(max_steps=7)
    assert float(cli.model.weight.detach()) == 7.0
    assert logged_steps(tmp_path) == list(range(7))


def test_validate_judges_the_last_checkpoint_and_leaves_the_run_as_it_is(run, tmp_path, monkeypatch):
    run(limit_val_batches=0)
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", ["moma_lightning", "validate", "--config", str(tmp_path / "stage.yaml"), "--trainer.limit_val_batches", "1.0"])
    assert MoMACLI().trainer.callback_metrics["val/weight"] == 5.0
    assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("launcher, environment", [({}, "SLURMEnvironment"), ({"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
                                                    "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "TorchElasticEnvironment")])  # fmt: skip
def test_torchrun_inside_a_slurm_job_numbers_its_own_processes(run, monkeypatch, launcher, environment):
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "77"}
    for name, value in (job | launcher).items():
        monkeypatch.setenv(name, value)
    cli = run(max_steps=1, limit_val_batches=0)
    assert type(cli.trainer._accelerator_connector.cluster_environment).__name__ == environment


def test_validate_without_a_checkpoint_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moma_lightning", "validate", "--config", str(config(tmp_path))])
    with pytest.raises(SystemExit, match=r"checkpoints/last\.ckpt is not there: train first"):
        MoMACLI()


def test_a_run_cut_before_its_exports_were_made_is_taken_up_again(run, tmp_path):
    run()
    (tmp_path / "runs/tiny/stage1/finished.json").unlink()
    assert run().trainer.global_step == 5
    assert (tmp_path / "runs/tiny/stage1/finished.json").exists()


def test_without_checkpoints_a_run_begins_anew(run, tmp_path):
    run()
    (tmp_path / "runs/tiny/stage1/checkpoints/last.ckpt").unlink()
    assert float(run().model.weight.detach()) == 5.0
    assert logged_steps(tmp_path) == [0, 1, 2, 3, 4], "the earlier run's rows are gone"


def test_a_killed_process_goes_on_from_its_last_checkpoint(run, tmp_path, caplog):
    killed = Forked("moma_lightning", "fit", "--config", str(config(tmp_path)), "--model.die_at", "3", log=tmp_path / "log")
    assert killed.wait(250) == 9, (tmp_path / "log").read_text()
    assert last_step(tmp_path) == 2
    with caplog.at_level("INFO"):
        cli = run()
    assert "going on from" in caplog.text
    assert (cli.trainer.global_step, float(cli.model.weight.detach())) == (5, 5.0)


@pytest.mark.parametrize("max_steps, saved", [(16, 8), (8, 6)])
def test_a_validation_that_was_cut_off_is_made_up_for(run, tmp_path, max_steps, saved):
    """A run's last step is not saved before its validation, so that it is trained again."""
    options = {"max_steps": max_steps, "val_check_interval": 8}
    killed = Forked("moma_lightning", "fit", "--config", str(config(tmp_path, **options)), "--model.die_in_validation", "true", log=tmp_path / "log")
    assert killed.wait(250) == 9, (tmp_path / "log").read_text()
    assert last_step(tmp_path) == saved
    cli = run(**options)
    assert validated_steps(tmp_path) == list(range(7, max_steps, 8)) and float(cli.model.weight.detach()) == max_steps
    with (tmp_path / "runs/tiny/stage1/metrics.csv").open() as file:
        assert [float(row["val/weight"]) for row in csv.DictReader(file) if row["val/weight"]] == list(range(8, max_steps + 1, 8))


def test_wandb_is_offline_without_a_key_and_knows_the_config(run, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    cli = run(max_steps=1)
    experiment = cli.trainer.loggers[1].experiment
    assert experiment.offline and experiment.config["model"]["class_path"].endswith("OneWeight")
    experiment.finish()
    assert list((tmp_path / "runs/tiny/stage1/wandb").glob("offline-run-*"))


def test_online_a_resumed_training_goes_on_with_its_wandb_run(tmp_path, monkeypatch):
    """Offline parts would replace each other when they are sent, so each is a run of its own."""
    monkeypatch.setattr("moma_lightning.training.loggers.wandb_mode", lambda: "online")
    monkeypatch.setenv("WANDB_MODE", "online")

    def number() -> str:
        return run_loggers(Run(tmp_path))[1]._wandb_init["id"]

    begun, anew = number(), number()
    assert begun != anew, "nothing was saved: it begins anew"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    assert number() == anew
    monkeypatch.setattr("moma_lightning.training.loggers.wandb_mode", lambda: "offline")
    assert number() is None


def test_interpolation_is_resolved(run):
    assert run(max_steps=1, default_root_dir="runs/of-${data.init_args.count}").trainer.default_root_dir == "runs/of-8"


def test_fast_dev_run_touches_no_run(run, tmp_path):
    run()
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "runs").rglob("*") if path.is_file())
    assert float(run("--trainer.fast_dev_run", "true").model.weight.detach()) == 1.0
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "runs").rglob("*") if path.is_file()) == before


@pytest.mark.parametrize("extra", [("--trainer.max_stepz", "3"), ("--model.init_args.slopes", "3"), ("--checkpoint.every", "3")])
def test_an_unknown_key_is_an_error(run, extra, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*extra)
    assert stop.value.code == 2 and extra[0].rsplit(".", 1)[1] in capsys.readouterr().err


def test_a_run_without_a_folder_is_refused(run):
    with pytest.raises(SystemExit, match="default_root_dir"):
        run(default_root_dir=None)


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["trian"], 2)])
def test_usage(arguments, code, capsys):
    assert entry.main(arguments) == code
    assert "generate" in capsys.readouterr().out


def test_usage_imports_nothing_large():
    code = "import sys; from moma_lightning.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.endswith("False\n")


def test_a_finished_mark_counts_only_with_its_checkpoint(tmp_path):
    run, until = Run(tmp_path), {"max_steps": -1, "max_epochs": 3, "max_time": None}
    run.mark_finished(10, until)
    assert not run.is_finished(**until)
    run.last_checkpoint.parent.mkdir()
    run.last_checkpoint.touch()
    assert run.is_finished(**until) and not run.is_finished(**until | {"max_epochs": 4})
    assert run.is_finished(**until | {"max_steps": 10}) and not run.is_finished(**until | {"max_steps": 11})
