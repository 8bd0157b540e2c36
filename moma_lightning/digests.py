"""What a model is, in a few letters: the digest of its files, or its name on the hub."""

import hashlib
from pathlib import Path

from moma_lightning.hub import hub_name, local_path


def content_digest(path: Path) -> str:
    """Digest of a file, or of all files of a folder with their names, but hidden ones (`.git`, `.DS_Store`). Raises FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    inside = (p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
    files = sorted(inside) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def identity(name: str) -> str:
    """A folder's or file's content digest; `owner/name@revision` stands for itself. Raises FileNotFoundError for a path that is not there."""
    found = local_path(name)
    return content_digest(found) if found is not None else str(hub_name(name))
