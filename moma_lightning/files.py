"""Files that are there whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a path beside `path` and rename what it wrote; folders are made.

    Raises OSError that names `path` when the disk is full or not writable; a file of that name from before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(beside)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} was not written ({error.strerror}); a file of that name from before is unchanged") from error
