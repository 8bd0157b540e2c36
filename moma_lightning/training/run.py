"""A run's folder: what it holds of trainings before, and whether a command goes on with one, begins anew, or has nothing left to do."""

import fcntl
import json
import os
import platform
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from moma_lightning.digests import identity
from moma_lightning.dotted import flat
from moma_lightning.files import write_beside, write_json
from moma_lightning.hub import local_path
from moma_lightning.training.checkpoint_folder import REST
from moma_lightning.training.checkpoint_io import naming

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


class Run:
    """A run's folder: is there something to go on from, and is there anything left to do."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.last_checkpoint = folder / CHECKPOINTS / "last.ckpt"
        self._finished, self._wandb_id = folder / "finished.json", folder / "wandb_id"

    def goes_on(self, ckpt_path: str | None) -> bool:
        """Whether there is a last checkpoint to go on from: for a command that names a `ckpt_path`, one of a training that began from that.

        So the same command goes on when it is requeued, wherever it began.
        """
        if ckpt_path is None or not self.last_checkpoint.exists():
            return self.last_checkpoint.exists()
        path = self.last_checkpoint / REST if self.last_checkpoint.is_dir() else self.last_checkpoint
        try:
            with naming(path):
                states = torch.load(path, "cpu", mmap=True, weights_only=True).get("callbacks", {})
        except ValueError as error:
            rank_zero_warn(f"{error}. Training begins from {ckpt_path}")
            return False
        return states.get(BeganFrom.__qualname__, {}).get("ckpt_path") == ckpt_path

    @rank_zero_only
    def hold(self) -> None:
        """Keep other processes from training here while this one lives, where the file system has locks. Exits where another one does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held = (self.folder / ".training").open("a+")
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone, unlike flock: loading workers outlive a killed one for seconds
        except (BlockingIOError, PermissionError):
            self._held.seek(0)
            holder = self._held.read()
            raise SystemExit(f"{self.folder}: another process trains here ({holder}): name another trainer.default_root_dir, or end that one") from None
        except OSError:
            return
        self._held.truncate(0)
        self._held.write(f"{platform.node()}, process {os.getpid()}, since {datetime.now():%Y-%m-%d %H:%M}")
        self._held.flush()

    def is_finished(self, **until: Any) -> bool:
        """Whether training came to this end (`ends`), or has `max_steps` steps, with what is exported at the end."""
        if not (self._finished.exists() and self.last_checkpoint.exists()):
            return False
        told = self._told()
        return told.get("until") == until or 0 <= until["max_steps"] <= told["step"]

    def _told(self) -> dict[str, Any]:
        """By `mark_finished`."""
        return json.loads(self._finished.read_text()) if self._finished.exists() else {}

    def _config(self) -> dict[str, Any]:
        """What the run's last training was started with."""
        path = self.folder / "config.yaml"
        return yaml.safe_load(path.read_text()) if path.exists() else {}

    def changed(self, config: dict[str, Any]) -> list[str]:
        """What `COUNTS` is another in `config` than in the run's config.yaml, of its last training. What one of them does not know is not another."""
        before, now = counting(self._config()), counting(config)
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
    def forget(self, metrics: bool = True) -> None:
        """Remove what an earlier training left that this one does not go on with: its mark of having finished, and its metrics, if it is of no other either."""
        for path in (self._finished, *([self.folder / ExperimentWriter.NAME_METRICS_FILE] if metrics else [])):
            path.unlink(missing_ok=True)


class BeganFrom(Callback):
    """Keeps in checkpoints which other checkpoint their training began from, None for one from the start."""

    def __init__(self, ckpt_path: str | None):
        self.ckpt_path = ckpt_path

    def state_dict(self) -> dict[str, Any]:
        return {"ckpt_path": self.ckpt_path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ckpt_path = self.ckpt_path or state_dict["ckpt_path"]


def checkpoints_under(root: str | None) -> str | None:
    """Where the run under `root` keeps its checkpoints."""
    return root and str(Path(root) / CHECKPOINTS)


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
