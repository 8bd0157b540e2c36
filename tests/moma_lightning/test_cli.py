"""The command line on a module of one weight: config, loggers, checkpoints, going on after a kill."""

import csv
import subprocess
import sys
from unittest.mock import Mock

import pytest
import wandb
import yaml

from moma_lightning import __main__ as entry
from moma_lightning.cli import MoMACLI
from moma_lightning.training.loggers import run_loggers
from moma_lightning.training.pace import Pace
from moma_lightning.training.run import Run
from tests.forked import Forked
from tests.moma_lightning.one_weight import config, early_stopping, last_step, logged_steps, validated_steps


def test_a_run_leaves_config_metrics_and_the_last_step(run, tmp_path):
    trainer = run("--model.slope", "2.0").trainer
    assert sum(isinstance(callback, Pace) for callback in trainer.callbacks) == 1
    folder = tmp_path / "runs/tiny/stage1"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["init_args"]["slope"] == 2.0 and str(saved["seed_everything"]) == "0", "False would seed nothing"
    assert logged_steps(tmp_path) == [0, 1, 2, 3, 4]
    assert last_step(tmp_path) == 5, "the last step is kept though it is no multiple of every_n_train_steps"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]


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


@pytest.mark.parametrize(("own", "bar"), [((), "RichProgressBar"), (("TQDMProgressBar", "LearningRateMonitor"), "TQDMProgressBar")])
def test_there_is_one_bar_and_one_monitor_and_ones_own_stay_alone(run, own, bar):
    given = [{"class_path": f"lightning.pytorch.callbacks.{name}"} for name in own]
    kinds = [type(callback).__name__ for callback in run(max_steps=1, enable_progress_bar=True, callbacks=given).trainer.callbacks]
    assert [kind for kind in kinds if kind.endswith("ProgressBar")] == [bar] and kinds.count("LearningRateMonitor") == 1


def test_a_run_without_checkpoints_is_refused(run):
    with pytest.raises(SystemExit, match="enable_checkpointing is false"):
        run(enable_checkpointing=False)


@pytest.mark.parametrize("option", ["save_weights_only", "save_on_exception"])
def test_checkpoints_that_no_run_goes_on_from_are_refused(run, option):
    with pytest.raises(SystemExit, match="no training goes on from"):
        run(f"--checkpoint.{option}", "true")


def test_with_a_logger_of_ones_own_the_config_is_in_the_runs_folder(run, tmp_path):
    run(logger={"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "elsewhere")}})
    assert [path.parent for path in tmp_path.rglob("config.yaml")] == [tmp_path / "runs/tiny/stage1"]


@pytest.mark.parametrize("rest", [["--checkpoint.every_n_epochs", "1"], ["--checkpoint.save_top_k", "1"]])
def test_options_that_write_no_checkpoint_before_the_end_are_refused(run, rest):
    with pytest.raises(SystemExit, match="writes nothing to go on from"):
        run("--checkpoint.every_n_train_steps", "0", *rest)


def test_checkpoints_may_be_by_epochs(run):
    run("--checkpoint.every_n_train_steps", "0", "--checkpoint.every_n_epochs", "1", "--checkpoint.save_top_k", "1", max_steps=1)


def test_validate_judges_the_last_checkpoint_and_leaves_the_run_as_it_is(run, tmp_path, monkeypatch):
    run(limit_val_batches=0)
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", ["moma_lightning", "validate", "--config", str(tmp_path / "stage.yaml"), "--trainer.limit_val_batches", "1.0"])
    assert MoMACLI().trainer.callback_metrics["val/weight"] == 5.0
    assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("launcher, environment", [({}, "SLURMEnvironment"), ({"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
                                                    "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "TorchElasticEnvironment")])
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


def test_where_wandbs_server_is_not_reached_the_way_without_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", Mock(side_effect=wandb.errors.CommError("connection refused")))
    with pytest.raises(ConnectionError, match=r"did not begin the run \(connection refused\)\. .* set WANDB_MODE=offline"):
        _ = run_loggers(Run(tmp_path))[1].experiment


def test_columns_with_commas_are_gone_on_with(tmp_path):
    """A learning rate is called by its regex."""
    for step in range(2):
        logger = run_loggers(Run(tmp_path))[0]
        logger.log_metrics({"lr-AdamW/a{1,2}/vectors": 0.5, "train/loss": 1.0}, step)
        logger.save()
    with (tmp_path / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"lr-AdamW/a{1,2}/vectors": "0.5", "step": str(step), "train/loss": "1.0"} for step in range(2)]


def test_wandbs_own_variables_name_project_and_run(tmp_path, monkeypatch):
    def told() -> tuple[str, str]:
        init = run_loggers(Run(tmp_path / "runs/mini/stage2"))[1]._wandb_init
        return init["project"], init["name"]

    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert told() == ("moma-lightning", "mini/stage2")
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.setenv(name, "")
    assert told() == ("moma-lightning", "mini/stage2")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "first")
    assert told() == ("mine", "first")


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
