"""Loggers that every run has: metrics.csv and wandb, both of which a run that goes on continues."""

import csv
import os
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from moma_lightning.training.run import Run
from moma_lightning.wandb_mode import wandb_mode, wandb_project


def run_loggers(run: Run) -> list[Logger]:
    """metrics.csv in the run's folder, and wandb, online or not as `wandb_mode` says: online a resumed training goes on with its run there.

    WANDB_PROJECT and WANDB_NAME say where and how it is called there; without them moma-lightning, and the last two parts of the folder.
    """
    folder, mode = run.folder, wandb_mode()
    os.environ["WANDB_MODE"] = mode
    folder.mkdir(parents=True, exist_ok=True)  # wandb falls back to a temporary folder where it is missing
    # Parts of a run that were written offline would replace each other when they are sent.
    known = run.wandb_id() if mode == "online" and "WANDB_RUN_ID" not in os.environ else None
    name = os.environ.get("WANDB_NAME") or "/".join(folder.parts[-2:])
    shown = RunWandbLogger(project=wandb_project(), name=name, save_dir=folder, id=known)
    return [ContinuedCSVLogger(folder, name="", version="", flush_logs_every_n_steps=20), shown]


class RunWandbLogger(WandbLogger):
    """WandbLogger that, where the server cannot be reached, names the way without it."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        try:
            return super().experiment
        except wandb.errors.AuthenticationError:
            raise
        except wandb.errors.CommError as error:
            raise ConnectionError(f"wandb's server did not begin the run ({error}). Where it cannot be reached set WANDB_MODE=offline, "
                                  "and send the run's wandb folder later by `wandb sync`") from error


class ContinuedWriter(ExperimentWriter):
    """Goes on with the metrics.csv that is there, where Lightning's writer would remove it."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.exists():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])  # a learning rate's name is a regex, which may hold commas


class ContinuedCSVLogger(CSVLogger):
    """CSVLogger whose metrics.csv survives a resume. Steps after the last checkpoint then occur twice: the later row counts."""

    _experiment: ExperimentWriter | None

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = ContinuedWriter(log_dir=self.log_dir)
        return self._experiment
