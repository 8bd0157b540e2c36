"""LightningCLI front end: one YAML a stage, defaults every run shares, and runs that go on where they stopped."""

import json
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from moma_lightning.files import write_beside
from moma_lightning.training.checkpoint_io import WholeCheckpointIO
from moma_lightning.training.epoch_ends import EpochEnds
from moma_lightning.training.guards import StopOnNonFinite, StopOnSignal, ended_together
from moma_lightning.training.loggers import run_loggers
from moma_lightning.training.pace import Pace
from moma_lightning.training.random_states import RandomStates
from moma_lightning.training.run import BeganFrom, Run, checkpoints_under, ends
from moma_lightning.training.step_checkpoint import StepCheckpoint
from moma_lightning.training.strategy import ShardedStrategy

__all__ = ["MoMACLI", "ShardedStrategy"]  # the strategy: importing it makes `--trainer.strategy sharded` known

SUBCOMMANDS = ("fit", "validate")  # of the Trainer's; the stages have no others


class MoMACLI(LightningCLI):
    """`python -m moma_lightning fit --config experiments/<experiment>/stage1.yaml`.

    Everything a run writes lies under `trainer.default_root_dir`: config.yaml (resolved), metrics.csv, wandb/ and
    checkpoints/last.ckpt, from which `fit` goes on, unless `--ckpt_path` names another than the run began from. Options of the ModelCheckpoint are
    under `checkpoint:`. wandb is offline without a key (`wandb_mode`): it never asks for one.
    """

    def __init__(self, **kwargs: Any):
        parser_mode = {"parser_mode": "omegaconf"}
        super().__init__(
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs=parser_mode | dict.fromkeys(SUBCOMMANDS, parser_mode),
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in SUBCOMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.set_defaults({
            "checkpoint.save_last": True,
            "checkpoint.save_top_k": 0,
            "checkpoint.every_n_train_steps": 200,
            "checkpoint.enable_version_counter": False,
        })
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=checkpoints_under)

    def before_instantiate_classes(self) -> None:
        """Decide, before anything large is loaded, whether `fit` starts, goes on, or has nothing left to do."""
        config = self.config[self.subcommand]
        _refuse(config)
        self.run = Run(Path(config.trainer.default_root_dir))
        if config.trainer.fast_dev_run:
            config.checkpoint.save_last = False  # Lightning would write last.ckpt even so, over the real run's
        if self.subcommand == "validate":
            self.save_config_callback = None  # the run's config.yaml and metrics.csv are training's
            if config.ckpt_path is None and not self.run.last_checkpoint.exists():
                raise SystemExit(f"{self.run.last_checkpoint} is not there: train first, or name a checkpoint by --ckpt_path")
        if self.subcommand == "fit" and not config.trainer.fast_dev_run:
            if self.run.goes_on(config.ckpt_path):
                self._end_if_finished(config)
            self.run.hold()

    def _end_if_finished(self, config: Any) -> None:
        """Exits where nothing is left to train; warns where training goes on with other settings."""
        now = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))
        changed = "; ".join(self.run.changed(now))
        if not self.run.is_finished(**ends(config.trainer)):
            if changed:
                rank_zero_warn(f"{self.run.folder}: training goes on with other settings than before ({changed})")
            return
        if changed:
            raise SystemExit(f"{self.run.folder}: training is complete, with other settings than these ({changed}): "
                             "give the former ones, name another trainer.default_root_dir, or remove the folder to train anew")
        what = "trainer.max_steps" if config.trainer.max_time is None else "trainer.max_steps and max_time, which counts the runs before too,"
        rank_zero_info(f"{self.run.folder}: training is complete; raise {what} to go on, or remove the folder to train anew")
        raise SystemExit(0)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        loggers = config["logger"]
        if loggers in (None, True):
            loggers = run_loggers(self.run) if self.subcommand == "fit" and not config["fast_dev_run"] else False
        given: list[Callback] = _as_list(config["callbacks"])

        def is_given(kind: type[Callback]) -> bool:
            return any(isinstance(callback, kind) for callback in given)

        callbacks = list(given)
        if config["enable_progress_bar"] is not False and not is_given(ProgressBar):
            callbacks.append(RichProgressBar())
        callbacks += [BeganFrom(self._get(self.config_init, "ckpt_path")), RandomStates(), StopOnNonFinite(), EpochEnds()]
        if not config["fast_dev_run"]:
            callbacks.append(StopOnSignal(self.run.last_checkpoint))  # which saves what those before it have found
        if loggers:
            callbacks += [Pace()] if is_given(LearningRateMonitor) else [LearningRateMonitor("step"), Pace()]
        plugins = [*_as_list(config["plugins"]), WholeCheckpointIO()]
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():  # torchrun inside a SLURM job numbers its own processes
            plugins.append(SLURMEnvironment(auto_requeue=False))  # StopOnSignal saves; experiments/cluster/slurm.sh requeues
        return super().instantiate_trainer(logger=loggers, callbacks=callbacks, plugins=plugins, **kwargs)

    def fit(self, model: Any, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """`Trainer.fit` from the run's own last checkpoint (`Run.goes_on`), else from `ckpt_path`, else from the start."""
        if self.trainer.fast_dev_run:
            with ended_together(self.trainer):
                self.trainer.fit(model, **kwargs)
            return
        if self.run.goes_on(ckpt_path):
            begun, ckpt_path = "" if ckpt_path is None else f", of the run that began from {ckpt_path}", str(self.run.last_checkpoint)
            rank_zero_info(f"going on from {ckpt_path}{begun}")
        else:
            self.run.forget(metrics=ckpt_path is None)
        with ended_together(self.trainer):
            self.trainer.fit(model, ckpt_path=ckpt_path, **kwargs)
            self.trainer.save_checkpoint(self.run.last_checkpoint)
            until = ends(self.config[self.subcommand].trainer)
            self.run.mark_finished(self.trainer.global_step, until, getattr(model, "decoder_digest", None))

    def validate(self, model: Any, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """`Trainer.validate` of `ckpt_path`, else of the run's last checkpoint. Prints; the run's own records stay as they are."""
        with ended_together(self.trainer):
            self.trainer.validate(model, ckpt_path=ckpt_path or str(self.run.last_checkpoint), **kwargs)


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved config in the run's folder, and shows it to wandb, once training begins: a run that was refused leaves no trace."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        path = Path(trainer.default_root_dir) / self.config_filename
        write_beside(path, lambda beside: self.parser.save(self.config, beside, skip_none=False, overwrite=True, multifile=False))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(json.loads(self.parser.dump(self.config, format="json", skip_unset=False)))


def _refuse(config: Any) -> None:
    """Exits for a run without a folder, and for checkpoints that no run goes on from."""
    if config.trainer.default_root_dir is None:
        raise SystemExit("trainer.default_root_dir is not set: name the run's folder, e.g. runs/mini/stage1")
    if config.trainer.enable_checkpointing is False:
        raise SystemExit("trainer.enable_checkpointing is false: a run goes on from its checkpoints; see checkpoint.* for how often they are written")
    often = config.checkpoint
    nothing_said = (often.every_n_epochs, often.every_n_train_steps, often.train_time_interval) == (None, None, None)  # Lightning's is each epoch then
    by_epochs = often.every_n_epochs or nothing_said
    if not (often.every_n_train_steps or often.train_time_interval or (by_epochs and often.save_top_k)):
        raise SystemExit("checkpoint.* writes nothing to go on from before training ends: set every_n_train_steps or train_time_interval, or every_n_epochs "
                         "and save_top_k to 1 or -1")
    if often.save_weights_only or often.save_on_exception:
        raise SystemExit("checkpoint.save_weights_only and save_on_exception leave a checkpoint that no training goes on from as if nothing had happened: "
                         "the optimizer is missing, or the batch that failed counts as trained")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
