"""A sharded checkpoint: a folder that each rank writes its part of, and a link to the newest whole one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from moma_lightning.files import commit, write_beside

#: Beside the shards: what is not a tensor (`torch.save`).
REST = "meta.pt"


def save(path: Path, tensors: dict[str, Any], rest: dict[str, Any], rank: int, barrier: Callable[[], None], broadcast: Callable[[bool], bool]) -> None:
    """Write `.<name>-<step>` beside `path` and then turn the link `path` to it; every rank must call this.

    broadcast: gives every rank what rank 0 found, since other nodes may still see the link as it was.

    The link is replaced in one step, with the files on the disk before, so a kill or a power cut at any moment leaves the old
    checkpoint or the new one. The old folder is then removed.
    """
    folder = path.with_name(f".{path.name}-{rest['global_step']}")
    if broadcast(path.is_symlink() and os.readlink(path) == folder.name):  # this step was saved before, and is not touched until the link turns
        folder = folder.with_name(f"{folder.name}-again")
    if rank == 0:
        remove_others(path, os.readlink(path) if path.is_symlink() else "")  # what a kill or a full disk left half
    barrier()
    try:
        dcp.save(tensors, checkpoint_id=folder)
        if rank == 0:
            write_beside(folder / REST, lambda beside: torch.save(rest, beside), durable=False)  # as a part of the folder
            _point(path, folder)
    except (CheckpointException, OSError) as error:
        why = (str(error).strip() or repr(error)).splitlines()[-1]
        raise OSError(f"{path} was not written ({why}); the checkpoint from before is unchanged") from error
    barrier()


def _point(path: Path, folder: Path) -> None:
    link = path.with_name(f".{path.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name, target_is_directory=True)
    commit(link, path)  # also in the place of a single file of an earlier run
    remove_others(path, folder.name)


def remove_others(path: Path, kept: str = "") -> None:
    """Of the folders beside `path` that it points to or once did, all but the one called `kept`."""
    for other in path.parent.glob(f".{path.name}-*"):
        if other.name != kept:
            shutil.rmtree(other, ignore_errors=True)
