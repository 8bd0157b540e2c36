"""LightningCLI front end: one YAML a stage, defaults every run shares, and runs that go on where they stopped."""

import json
import os
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from moma_lightning.digests import identity
from moma_lightning.dotted import flat
from moma_lightning.files import write_beside, write_json
from moma_lightning.hub import local_path
from moma_lightning.training.checkpoint_io import WholeCheckpointIO
from moma_lightning.training.data_wait import DataWait
from moma_lightning.training.epoch_ends import EpochEnds
from moma_lightning.training.guards import StopOnNonFinite, StopOnSignal, ended_together
from moma_lightning.training.random_states import RandomStates
from moma_lightning.training.strategy import ShardedStrategy
from moma_lightning.wandb_mode import wandb_mode

__all__ = ["MoMACLI", "Run", "ShardedStrategy"]  # the strategy: importing it makes `--trainer.strategy sharded` known

SUBCOMMANDS = ("fit", "validate")  # of the Trainer's; the stages have no others
CHECKPOINTS = "checkpoints"
#: How settings begin that make another training of it, and among these some that move nothing of what is trained.
COUNTS = ("model.", "data.", "seed_everything", *(f"trainer.{name}" for name in ("accumulate_grad_batches", "gradient_clip", "precision", "callbacks")))
DOES_NOT_COUNT = (
    *(f"data.init_args.config.{name}" for name in ("num_workers", "val", "bad_samples")),
    *(f"model.init_args.{name}" for name in ("training.", "grid", "clip", "foundation.sam")),
)
DECODER = "model.init_args.decoder"
#: What ends a training, of the Trainer's settings.
ENDS = ("max_steps", "max_epochs", "max_time")


class MoMACLI(LightningCLI):
    """`python -m moma_lightning fit --config experiments/<experiment>/stage1.yaml`.

    Everything a run writes lies under `trainer.default_root_dir`: config.yaml (resolved), metrics.csv, wandb/ and
    checkpoints/last.ckpt, from which `fit` goes on unless `--ckpt_path` says otherwise. Options of the ModelCheckpoint are
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
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=checkpoint_folder)

    def before_instantiate_classes(self) -> None:
        """Decide, before anything large is loaded, whether `fit` starts, goes on, or has nothing left to do."""
        config = self.config[self.subcommand]
        if config.trainer.default_root_dir is None:
            raise SystemExit("trainer.default_root_dir is not set: name the run's folder, e.g. runs/mini/stage1")
        self.run = Run(Path(config.trainer.default_root_dir))
        if config.trainer.enable_checkpointing is False:
            raise SystemExit("trainer.enable_checkpointing is false: a run goes on from its checkpoints; see checkpoint.* for how often they are written")
        often = config.checkpoint
        if not (often.every_n_train_steps or often.train_time_interval or often.save_top_k):
            raise SystemExit("checkpoint.every_n_epochs with save_top_k 0 writes nothing to go on from: set every_n_train_steps, or save_top_k to 1 or -1")
        if config.trainer.fast_dev_run:
            config.checkpoint.save_last = False  # Lightning would write last.ckpt even so, over the real run's
        if self.subcommand == "validate":
            self.save_config_callback = None  # the run's config.yaml and metrics.csv are training's
            if config.ckpt_path is None and not self.run.last_checkpoint.exists():
                raise SystemExit(f"{self.run.last_checkpoint} is not there: train first, or name a checkpoint by --ckpt_path")
        if self.subcommand != "fit" or config.trainer.fast_dev_run:
            return
        if config.ckpt_path is not None or not self.run.last_checkpoint.exists():
            return
        now = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))
        changed = "; ".join(self.run.changed(now))
        if not self.run.is_finished(**ends(config.trainer)):
            if changed:
                rank_zero_warn(f"{self.run.folder}: training goes on with other settings than before ({changed})")
            return
        if changed:
            raise SystemExit(f"{self.run.folder}: training is complete, with other settings than these ({changed}): "
                             "give the former ones, name another trainer.default_root_dir, or remove the folder to train anew")
        rank_zero_info(f"{self.run.folder}: training is complete; raise trainer.max_steps to go on, or remove the folder to train anew")
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
        callbacks += [RandomStates(), StopOnNonFinite(), EpochEnds()]
        if not config["fast_dev_run"]:
            callbacks.append(StopOnSignal(self.run.last_checkpoint))  # which saves what those before it have found
        if loggers:
            callbacks += [DataWait()] if is_given(LearningRateMonitor) else [LearningRateMonitor("step"), DataWait()]
        plugins = [*_as_list(config["plugins"]), WholeCheckpointIO()]
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():  # torchrun inside a SLURM job numbers its own processes
            plugins.append(SLURMEnvironment(auto_requeue=False))  # StopOnSignal saves; experiments/cluster/slurm.sh requeues
        return super().instantiate_trainer(logger=loggers, callbacks=callbacks, plugins=plugins, **kwargs)

    def fit(self, model: Any, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """`Trainer.fit` from `ckpt_path`, else from the run's own last checkpoint, else from the start."""
        if self.trainer.fast_dev_run:
            with ended_together(self.trainer):
                self.trainer.fit(model, **kwargs)
            return
        if ckpt_path is None and self.run.last_checkpoint.exists():
            ckpt_path = str(self.run.last_checkpoint)
            rank_zero_info(f"going on from {ckpt_path}")
        elif ckpt_path is None:
            self.run.forget()
        with ended_together(self.trainer):
            self.trainer.fit(model, ckpt_path=ckpt_path, **kwargs)
            self.trainer.save_checkpoint(self.run.last_checkpoint)
            until = ends(self.config[self.subcommand].trainer)
            self.run.mark_finished(self.trainer.global_step, until, getattr(model, "decoder_digest", None))

    def validate(self, model: Any, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """`Trainer.validate` of `ckpt_path`, else of the run's last checkpoint. Prints; the run's own records stay as they are."""
        with ended_together(self.trainer):
            self.trainer.validate(model, ckpt_path=ckpt_path or str(self.run.last_checkpoint), **kwargs)


class StepCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that never saves between two micro-batches, whose gradients would be lost, nor before a last validation, which would be left out.

    So it does not save a resumed step once more in its next micro-batch, nor at a validation between two, lets training that is told to stop (by
    EarlyStopping or `max_time`) finish its step first, and saves the last step when training ends.
    """

    _step, _is_within, _is_told_to_stop = 0, False, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._is_within, self._step = trainer.global_step == self._step, trainer.global_step
        self._stop_between_steps(trainer)
        if trainer.global_step != trainer.max_steps:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == trainer.max_steps:
            super().on_train_batch_end(trainer, pl_module, None, None, 0)
        super().on_train_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_within:
            super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_between_steps(trainer)

    def _stop_between_steps(self, trainer: Trainer) -> None:
        self._is_told_to_stop |= trainer.should_stop
        trainer.should_stop = self._is_told_to_stop and not self._is_within


class Run:
    """A run's folder: is there something to go on from, and is there anything left to do."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.last_checkpoint = folder / CHECKPOINTS / "last.ckpt"
        self._finished, self._wandb_id = folder / "finished.json", folder / "wandb_id"

    def is_finished(self, **until: Any) -> bool:
        """Whether training came to this end (`ends`), or has `max_steps` steps, with what is exported at the end."""
        if not (self._finished.exists() and self.last_checkpoint.exists()):
            return False
        told = self._told()
        return told.get("until") == until or 0 <= until["max_steps"] <= told["step"]

    def _told(self) -> dict[str, Any]:
        """By `mark_finished`."""
        return json.loads(self._finished.read_text()) if self._finished.exists() else {}

    def changed(self, config: dict[str, Any]) -> list[str]:
        """What `COUNTS` is another in `config` than in the run's config.yaml, of its last training. What one of them does not know is not another."""
        path = self.folder / "config.yaml"
        before, now = counting(yaml.safe_load(path.read_text()) if path.exists() else {}), counting(config)
        found = [f"{key} {value!r}, it was {before[key]!r}" for key, value in now.items() if key in before and before[key] != value]
        # Sections: nothing on one side, options below that name on the other.
        found += [f"{key} is set, it was {value!r}" for key, value in before.items() if key not in now and any(name.startswith(f"{key}.") for name in now)]
        found += [f"{key} {value!r}, it was set" for key, value in now.items() if key not in before and any(name.startswith(f"{key}.") for name in before)]
        decoder, digest = now.get(DECODER), self._told().get("decoder")
        if digest and decoder and decoder == before.get(DECODER) and local_path(decoder) is not None and identity(decoder) != digest:
            found.append(f"{DECODER} {decoder!r} holds other weights now")
        return found

    @rank_zero_only
    def mark_finished(self, step: int, until: dict[str, Any], decoder: str | None = None) -> None:
        """until: the settings that it was trained by (`ends`). decoder: digest of stage 1's result that stage 2 was trained with."""
        write_json(self._finished, {"step": step, "until": until} | ({} if decoder is None else {"decoder": decoder}))

    @rank_zero_only
    def wandb_id(self) -> str:
        """The id of the wandb run that this one goes on with, else a new one."""
        from wandb.sdk.lib.runid import generate_id  # as late as Lightning's own logger imports it

        if not (self._wandb_id.exists() and self.last_checkpoint.exists()):
            write_beside(self._wandb_id, lambda path: path.write_text(generate_id()))
        return self._wandb_id.read_text()

    @rank_zero_only
    def forget(self) -> None:
        """Remove what an earlier run without checkpoints left, so that its metrics are not taken for the new one's."""
        for path in (self._finished, self.folder / ExperimentWriter.NAME_METRICS_FILE):
            path.unlink(missing_ok=True)


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


class ContinuedWriter(ExperimentWriter):
    """Goes on with the metrics.csv that is there, where Lightning's writer would remove it."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.exists():
            self.metrics_keys = path.read_text().split("\n", 1)[0].split(",")


class ContinuedCSVLogger(CSVLogger):
    """CSVLogger whose metrics.csv survives a resume. Steps after the last checkpoint then occur twice: the later row counts."""

    _experiment: ExperimentWriter | None

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = ContinuedWriter(log_dir=self.log_dir)
        return self._experiment


def counting(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that count, by dotted names; a table of learning rates is one of them."""
    found: dict[str, Any] = {}
    for key, value in flat(config).items():
        name, table, entry = key.partition(".lr_multipliers")
        if key.startswith(COUNTS) and not key.startswith(DOES_NOT_COUNT):
            found |= {key: value} if not table else {name + table: found.get(name + table, {}) | ({entry[1:]: value} if entry else {})}
    return found


def ends(trainer: Any) -> dict[str, Any]:
    """What of the Trainer's settings says when training ends, as JSON has it."""
    return json.loads(json.dumps({name: trainer.get(name) for name in ENDS}, default=str))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def checkpoint_folder(root: str | None) -> str | None:
    """Where the run under `root` keeps its checkpoints."""
    return root and str(Path(root) / CHECKPOINTS)


def run_loggers(run: Run) -> list[Logger]:
    """metrics.csv in the run's folder, and wandb, online or not as `wandb_mode` says: online a resumed training goes on with its run there."""
    folder, mode = run.folder, wandb_mode()
    os.environ["WANDB_MODE"] = mode
    folder.mkdir(parents=True, exist_ok=True)  # wandb falls back to a temporary folder where it is missing
    # Parts of a run that were written offline would replace each other when they are sent.
    known = run.wandb_id() if mode == "online" and "WANDB_RUN_ID" not in os.environ else None
    wandb = WandbLogger(project="moma-lightning", name="/".join(folder.parts[-2:]), save_dir=folder, id=known)
    return [ContinuedCSVLogger(folder, name="", version="", flush_logs_every_n_steps=20), wandb]
