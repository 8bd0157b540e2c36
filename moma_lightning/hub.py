"""Names of models: a folder or file here, or `owner/name[@revision[/path inside]]` on the Hugging Face hub.

Downloads go through huggingface_hub into its cache, so HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and HF_TOKEN mean what they
always mean.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name
from huggingface_hub.utils import httpx
from safetensors import SafetensorError

REPOSITORY = Path(__file__).parents[1]
_HUB_NAME = re.compile(r"(?P<repo_id>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[\w.-]+)(/(?P<path>.+))?)?")


@dataclass(frozen=True)
class HubName:
    """revision: branch, tag or commit; None is the main branch. path: a file or folder inside the repository."""

    repo_id: str
    revision: str | None = None
    path: str | None = None

    def __str__(self) -> str:
        return self.repo_id + (f"@{self.revision}" if self.revision else "") + (f"/{self.path}" if self.path else "")


def local_path(path: str) -> Path | None:
    """The existing file or folder `path` means, tried from the working directory and then from the repository."""
    for candidate in (Path(path), REPOSITORY / path):
        if candidate.exists():
            return candidate
    return None


def hub_name(name: str) -> HubName:
    """Raises FileNotFoundError for what is no hub name: it was meant as a path, and is not there."""
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise FileNotFoundError(f"{name}: no such file or folder here or in {REPOSITORY}, and not a hub name of the form "
                                "owner/name[@revision[/path inside]]")
    return HubName(match["repo_id"], match["revision"], match["path"])


def resolve(name: str) -> dict[str, Any]:
    """Keyword arguments of a library's `from_pretrained` for a folder or a hub name; a path inside becomes `subfolder`.

    Raises FileNotFoundError for a path that is not there.
    """
    if (found := local_path(name)) is not None:
        return {"pretrained_model_name_or_path": str(found)}
    hub = hub_name(name)
    given = {"pretrained_model_name_or_path": hub.repo_id, "revision": hub.revision, "subfolder": hub.path}
    return {key: value for key, value in given.items() if value is not None}


def find_file(name: str, file: str | None = None) -> Path:
    """The file `name`, or `file` in the folder `name`, here or downloaded. Raises FileNotFoundError that says how to get it."""
    if (found := local_path(name if file is None else f"{name}/{file}")) is not None:
        return found
    hub = hub_name(name)
    path = "/".join(part for part in (hub.path, file) if part)
    if not path:
        raise FileNotFoundError(f"{name}: names no file; write {hub.repo_id}@{hub.revision or 'main'}/<file>")
    with loading(name):
        return Path(hf_hub_download(hub.repo_id, path, revision=hub.revision))


def find_folder(name: str, files: Sequence[str]) -> Path:
    """The folder `name`, or one with `files` of a repository; a name without revision that is not there is returned as it is."""
    if (found := local_path(name)) is not None:
        return found
    return [find_file(name, file) for file in files][-1].parent if "@" in name else Path(name)


def find_snapshot(name: str, patterns: list[str], but: Sequence[str] = ()) -> Path:
    """The folder `name`, or one with the files of a repository that these patterns name, and no others."""
    if (found := local_path(name)) is not None:
        return found
    hub = hub_name(name)
    with loading(name):
        return Path(snapshot_download(hub.repo_id, revision=hub.revision, allow_patterns=patterns, ignore_patterns=list(but)))


def has_file(name: str, file: str) -> bool:
    """Whether the folder or repository `name` holds `file`, as far as the hub, or offline its cache, tells."""
    if (found := local_path(name)) is not None:
        return (found / file).is_file()
    hub = hub_name(name)
    try:
        hf_hub_download(hub.repo_id, f"{hub.path}/{file}" if hub.path else file, revision=hub.revision)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return False
    return True


def cached_commit(name: str) -> str | None:
    """The commit that the name's branch (without one, the main branch) or tag points to in the local cache; None where there is none, or no hub name."""
    try:
        hub = hub_name(name)
    except FileNotFoundError:
        return None
    reference = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub.repo_id, repo_type="model") / "refs" / (hub.revision or "main")
    return reference.read_text().strip() if reference.is_file() else None


def hub_commit(hub: HubName) -> str:
    """The commit that the hub itself says a branch or tag points to."""
    return str(HfApi().model_info(hub.repo_id, revision=hub.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha)


@cache
def loaded_commit(name: str) -> str | None:
    """The commit that a name's branch or tag is loaded at: the hub's, or where it does not answer the cache's, as its client has it.

    None for a commit's own name and where neither knows one. Asked once in a process, so that all of a command means the same by a name.
    """
    hub = hub_name(name)
    if hub.revision is not None and REGEX_COMMIT_HASH.fullmatch(hub.revision):
        return None
    try:
        return hub_commit(hub)
    except (OSError, ValueError, httpx.TransportError):  # ValueError: a page of something in between
        return cached_commit(name)


def require_cached(name: str) -> None:
    """Where the hub may not be asked: raises FileNotFoundError, as `loading`, for a name of which nothing is in the cache."""
    if not constants.HF_HUB_OFFLINE or local_path(name) is not None:
        return
    hub = hub_name(name)
    commit = cached_commit(name) or hub.revision or "main"
    snapshot = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub.repo_id, repo_type="model") / "snapshots" / commit
    with loading(name):
        if not snapshot.is_dir():
            raise FileNotFoundError(snapshot)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Whatever a library raises while it reads `name` from the hub becomes an error that names it and the command to fetch it."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{name}: one of its files is not a whole safetensors file ({error}); fetch or write it again") from error
    except (OSError, HFValidationError, httpx.TransportError) as error:
        if local_path(name) is not None:
            raise
        why = "it is not in the cache, and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"{name} could not be loaded ({why}).\nFetch it where the hub can be reached: python -m moma_lightning fetch --models {name}\n"
            "A repository behind a licence needs HF_TOKEN as well."
        ) from error
