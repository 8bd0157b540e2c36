"""`python -m moma_lightning fetch`: download the models that an experiment names, and write down their digests."""

import fnmatch
import glob
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.hf_api import RepoFile
from omegaconf import OmegaConf

from moma_lightning.files import write_json
from moma_lightning.hub import HubName, hub_commit, hub_name, loading, local_path

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt")
#: What the libraries read besides weights; everything else in a repository (pictures, other frameworks' weights) is left there.
READ = ("*.json", "*.txt", "*.model", "*.jinja", "*.yaml")
NOT_READ = ("safety_checker/*", "vae_encoder/*", "vae_decoder/*", "*.fp16.*", "*non_ema*", "*onnx*", "*openvino*", "*open_clip*")


@dataclass(frozen=True)
class Fetched:
    """One file: where it came from and where it lies. sha256: of what was written, which is what the hub lists (see `_checked`)."""

    name: str
    file: str
    commit: str
    bytes: int
    sha256: str
    path: str


def fetch(experiment: str | None = None, models: str | list[str] | None = None, out: str | None = None) -> None:
    """Download models into huggingface_hub's cache, from where every command reads them, offline too.

    Args:
        experiment: A YAML or a folder of them: every `owner/name@revision[/path inside]` in them is fetched.
        models: Further models by that name: one, or '[a/b@main, c/d@main]'.
        out: JSON file for what was fetched: file, commit, bytes, sha256.
    """
    names = [name for path in yamls(experiment) for name in named_models(path)] + ([models] if isinstance(models, str) else models or [])
    if not experiment and not names:
        raise ValueError("nothing to fetch: give --experiment or --models")
    done = [entry for name in dict.fromkeys(names) for entry in fetch_model(name)]
    print(f"{len(done)} files, {sum(entry.bytes for entry in done) / 1e9:.2f} GB")
    if out:
        write_json(Path(out), [asdict(entry) for entry in done])
        print(f"digests: {out}")


def yamls(experiment: str | None) -> list[Path]:
    """Raises FileNotFoundError for an experiment that is not there."""
    path = Path(experiment) if experiment else None
    if path is None:
        return []
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such experiment")
    return sorted(path.rglob("*.yaml")) if path.is_dir() else [path]


def named_models(path: Path) -> list[str]:
    """Hub names with a revision anywhere in a YAML, and in YAMLs beside it that it names (`foundation: foundation.yaml`)."""
    names = []
    for text in _strings(OmegaConf.to_container(OmegaConf.load(path), resolve=False)):
        if text.endswith(".yaml") and (path.parent / text).is_file():
            names += named_models(path.parent / text)
        elif "@" in text and local_path(text) is None and _is_hub_name(text):
            names.append(text)
    return names


def fetch_model(name: str) -> list[Fetched]:
    """Download what a hub name stands for and compare it with the hub's digests.

    Raises FileNotFoundError for what the hub does not have, OSError for a file whose digest is not the hub's.
    """
    hub = hub_name(name)
    with loading(name):
        commit = hub_commit(hub)
        listed = [f for f in HfApi().list_repo_tree(hub.repo_id, revision=commit, recursive=True) if isinstance(f, RepoFile)]
        sizes = {file.path: file for file in listed}
        chosen = wanted(list(sizes), hub.path)
        if not chosen:
            raise FileNotFoundError(f"the repository holds no {hub.path or 'weights'}")
        print(f"{name}: {len(chosen)} files, {sum(sizes[file].size for file in chosen) / 1e9:.2f} GB")
        folder = Path(snapshot_download(hub.repo_id, revision=hub.revision, allow_patterns=[glob.escape(file) for file in chosen]))
    return [_checked(hub, commit, sizes[file], folder / file) for file in chosen]


def wanted(files: list[str], path: str | None = None) -> list[str]:
    """Which files of a repository the libraries read: below `path` (or that file alone); of a folder's weights, the safest format.

    A diffusers pipeline's own weights lie in its folders: single-file copies beside `model_index.json` are left out. Raises
    FileNotFoundError for a model whose weights are there in no form that is read (of other frameworks, or as an fp16 variant alone).
    """
    if path in files:
        return [path]
    inside = [file for file in files if path is None or file.startswith(f"{path}/")]
    below = {file: file[len(path) + 1 :] if path else file for file in inside}
    kept = [file for file in inside if not any(fnmatch.fnmatch(below[file], pattern) for pattern in NOT_READ)]
    is_pipeline = "model_index.json" in below.values()
    weights = [file for file in kept if file.endswith(WEIGHTS) and not (is_pipeline and "/" not in below[file])]
    if path is None and not is_pipeline:
        weights = [file for file in weights if "/" not in file]
    safe = {str(Path(file).parent) for file in weights if file.endswith(".safetensors")}
    weights = [file for file in weights if file.endswith(".safetensors") or str(Path(file).parent) not in safe]
    read = [file for file in kept if any(fnmatch.fnmatch(file, pattern) for pattern in READ)]
    models = {str(Path(file).parent) for file in read if Path(file).name == "config.json" and (is_pipeline or "/" not in below[file])}
    if empty := models - {str(Path(file).parent) for file in weights}:
        raise FileNotFoundError(f"no weights that are read beside {', '.join(sorted(f'{folder}/config.json'.removeprefix('./') for folder in empty))}")
    return sorted(weights + read)


def _checked(hub: HubName, commit: str, listed: RepoFile, path: Path) -> Fetched:
    """The hub lists large files by their sha256, small ones by git's digest of their content."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    kind, found, wanted = ("git digest", git_digest(path), listed.blob_id) if listed.lfs is None else ("sha256", digest, listed.lfs.sha256)
    if found != wanted:
        raise OSError(f"{path}: its {kind} is {found}, the hub's {wanted}: delete the file and fetch again")
    print(f"  {digest}  {listed.path}")
    return Fetched(hub.repo_id, listed.path, commit, path.stat().st_size, digest, str(path))


def git_digest(path: Path) -> str:
    """What git calls a file's content: SHA-1 of a header and the bytes."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _is_hub_name(text: str) -> bool:
    try:
        hub_name(text)
    except FileNotFoundError:
        return False
    return True


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for part in value.values() for text in _strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in _strings(part)]
    return [value] if isinstance(value, str) else []
