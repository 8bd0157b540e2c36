"""Checkpoint files that are there whole or not at all."""

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint import CheckpointException

from moma_lightning.files import write_beside
from moma_lightning.training.checkpoint_folder import remove_others


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, where Lightning's goes through the system's temporary folder.

    A kill while saving, or a full disk (OSError that names the file), leaves the checkpoint from before as it was.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        for leftover in Path(path).parent.glob(f".{Path(path).stem}.*{Path(path).suffix}"):
            if leftover.is_file():
                leftover.unlink(missing_ok=True)  # of a process that was killed while saving
        write_beside(Path(path), lambda beside: torch.save(checkpoint, beside))
        remove_others(Path(path))  # an earlier run's folder, whose link the file has replaced

    def remove_checkpoint(self, path: str | Path) -> None:
        """Of sharded training's folders the folder too, and not the link to it alone."""
        if "://" in str(path) or not Path(path).is_symlink():
            super().remove_checkpoint(path)
            return
        folder = Path(path).resolve()
        Path(path).unlink()
        shutil.rmtree(folder, ignore_errors=True)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """A file's tensors are mapped, not read: the ranks of a node then share one copy in the system's cache."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        if Path(path).is_dir():
            raise ValueError(f"checkpoint {path} is a folder, as sharded training writes it: go on with --trainer.strategy sharded")
        if not Path(path).is_file():
            raise FileNotFoundError(f"checkpoint {path} is not there")
        with naming(path):
            return torch.load(path, map_location or "cpu", mmap=True, weights_only=weights_only)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """A checkpoint that cannot be read, cut short or of another kind, is a ValueError that names it."""
    try:
        yield
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, CheckpointException) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a whole checkpoint ({why}): go on from another by --ckpt_path, or move it away to start anew") from error
