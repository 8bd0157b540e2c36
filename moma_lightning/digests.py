"""What a model is, in a few letters: the digest of its files, or its name and commit on the hub."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moma_lightning.hub import hub_name, loaded_commit, local_path


def content_digest(path: Path) -> str:
    """Digest of a file, or of all files of a folder with their names, but hidden ones (`.git`, `.DS_Store`). Raises FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    files = sorted(files_below(path)) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def files_below(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Without hidden ones and what may not be read. Linked folders are entered, which `Path.rglob` passes over, but for one that leads back to a folder
    that it lies in.
    """
    above |= {folder.resolve()}
    try:
        paths = list(folder.iterdir())
    except PermissionError:  # as a file system's lost+found
        return
    for path in paths:
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() not in above:
            yield from files_below(path, above)


def identity(name: str) -> str:
    """A folder's or file's content digest; of the hub `owner/name@<commit>` stands for itself, and any other name for the commit that it is loaded at.

    Raises FileNotFoundError for a path that is not there.
    """
    found = local_path(name)
    return content_digest(found) if found is not None else at_commit(str(hub_name(name)), loaded_commit(name))


def at_commit(name: str, commit: str | None) -> str:
    """`owner/name@branch (commit)`; without a commit the name alone."""
    return name if commit is None else f"{name} ({commit})"


def same_identity(then: Any, now: Any) -> bool:
    """Of identities, throughout what is nested by name. A branch at a commit is that commit by its own name; and a commit counts where it is known now:
    what was made elsewhere is looked at on machines without the weights, too.
    """
    if isinstance(now, Mapping):
        return isinstance(then, Mapping) and then.keys() == now.keys() and all(same_identity(then[name], now[name]) for name in now)
    if not (isinstance(then, str) and isinstance(now, str)):
        return now == then
    return now == then.partition(" (")[0] or pinned(now) == pinned(then)


def pinned(told: str) -> str:
    """`owner/name@branch (commit)` as `owner/name@commit`; what is no such name as it is."""
    name, _, commit = told.removesuffix(")").partition(" (")
    try:
        return str(replace(hub_name(name), revision=commit)) if commit else told
    except FileNotFoundError:
        return told
