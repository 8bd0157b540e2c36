"""Files that are there whole or not at all."""

import errno
import glob
import json
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def write_beside(path: Path, write: Callable[[Path], object], durable: bool = True) -> None:
    """Call `write` with a path beside `path` and rename what it wrote; folders are made.

    durable: wait for the disk (see `commit`). Small files by the thousand need not, where a digest tells a whole one.
    Raises OSError that names `path` when the disk is full or not writable; a file of that name from before stays. What else goes
    wrong in `write` is raised as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{platform.node()}.{os.getpid()}{path.suffix}")
    try:
        write(beside)
        commit(beside, path) if durable else os.replace(beside, path)
    except Exception as error:
        beside.unlink(missing_ok=True)
        if not _is_of_the_disk(error):
            raise
        number, why = (error.errno, error.strerror) if isinstance(error, OSError) else (errno.EIO, str(error).partition("\n")[0])
        raise OSError(number, f"{path} was not written ({why}); a file of that name from before is unchanged") from error


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """`write_beside` of what is in memory."""
    write_beside(path, lambda beside: beside.write_bytes(content), durable)


def write_json(path: Path, value: Any, indent: int = 1) -> None:
    """`write_beside` of a value as JSON, its letters as they are."""
    write_bytes(path, (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode())


def place_beside(path: Path) -> Path:
    """Where this process alone may write what `commit` is to rename to `path`; what killed processes left there is removed.

    The workers of a run that was killed may live on for seconds, and write on: not into the next run's file, as that has another name.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*writing"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.writing")


def commit(beside: Path, path: Path) -> None:
    """Rename a written file or folder to `path`, its content first on the disk: after a power cut `path` is not an empty or half one.

    Raises OSError, also where the disk only now says that it is full.
    """
    for written in (*beside.rglob("*"), beside):
        _sync(written)
    os.replace(beside, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    with nullcontext() if path.is_file() else suppress(OSError):  # not every system knows this of a folder
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _is_of_the_disk(error: Exception) -> bool:
    """torch and safetensors report a full disk in their own ways; an OSError without a number is a library's (of a hub, of a picture)."""
    return error.errno is not None if isinstance(error, OSError) else type(error) in (RuntimeError, SafetensorError)
