"""Triplet shards: webdataset tars, written with the same bytes for the same input, resumable, with a manifest; and found.

A sample is `<key>.png` or `<key>.jpg`, `<key>.mask.png` (of 1 bit, or 8 with 255 = subject, of the picture as it is shown, that is after
its EXIF orientation) and `<key>.json` with at least `REQUIRED_FIELDS`. `datamodules.triplets` reads them.
"""

import errno
import glob
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand

from moma_lightning.files import commit, place_beside, write_json

REQUIRED_FIELDS = ("caption", "caption_full", "label", "image_id", "source", "license", "author")
PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # that are read; `ShardSample` says which are written
MANIFEST = "manifest.json"


@dataclass
class ShardSample:
    """A sample to be written. `picture` and `mask` are encoded files; `extension` is "jpg" or "png"."""

    key: str
    picture: bytes
    extension: str
    mask: bytes
    fields: dict[str, Any]

    def __post_init__(self):
        missing = [name for name in REQUIRED_FIELDS if name not in self.fields]
        if missing:
            raise ValueError(f"sample {self.key!r} lacks the fields {missing}")
        if not self.key or "." in self.key or "/" in self.key:
            raise ValueError(f"key {self.key!r} must be a name without dots and slashes: the reader splits keys at them")
        if self.extension not in ("jpg", "png"):
            raise ValueError(f"sample {self.key!r}: extension {self.extension!r} is neither jpg nor png")


def write_shards(
    folder: Path,
    split: str,
    count: int,
    samples: Callable[[range], Iterable[ShardSample]],
    *,
    samples_per_shard: int,
    seed: int,
    config: dict[str, Any],
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `folder/{split}-{00000..}.tar` and this split's part of `folder/manifest.json`, which is returned.

    samples: makes the samples of a range of indices; it is asked only for shards that are not there yet. It may leave bad
        ones out, so the manifest counts what was written.
    config: whatever decides the content besides `seed`; JSON values.
    overwrite: begin again when the folder holds this split from another seed or configuration, instead of a ValueError.

    A shard is finished when the manifest has it and its sha256 is right; finished shards are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps({"requested": count, "samples_per_shard": samples_per_shard, "seed": seed, "config": config}))
    part = _part(folder, split, wanted, overwrite)
    for number, start in enumerate(range(0, count, samples_per_shard)):
        name = f"{split}-{number:05d}.tar"
        if _is_finished(folder / name, part["shards"].get(name)):
            continue
        part["shards"][name] = write_shard(folder / name, samples(range(start, min(start + samples_per_shard, count))))
        part["count"] = sum(shard["count"] for shard in part["shards"].values())
        write_json(folder / MANIFEST, read_manifest(folder) | {split: part})
    return part


def write_shard(path: Path, samples: Iterable[ShardSample]) -> dict[str, Any]:
    """Write one tar beside its place and rename it; returns what a manifest says of it: count, sha256.

    A full disk raises an OSError that names the shard, and leaves nothing of it behind.
    """
    beside = place_beside(path)
    try:
        with beside.open("wb") as file, tarfile.open(fileobj=file, mode="w|") as tar:
            count = sum(_add(tar, sample) for sample in samples)
        entry = {"count": count, "sha256": sha256(beside)}  # of what was written, not of what may have taken its place since
        commit(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = "the disk is full: free some space and run again, finished shards are kept"
        raise OSError(error.errno, reason, str(path)) from error
    return entry


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest by split; empty when there is none."""
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.exists() else {}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contains_label(caption: str, label: str) -> bool:
    """Whether the label stands in the caption as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", caption, re.IGNORECASE) is not None


def expand_shards(patterns: str | list[str]) -> list[str]:
    """The sorted shards that paths, globs, brace ranges and URLs name; ValueError for one that names none."""
    found: dict[str, str] = {}  # by the whole path: one shard may be written in two ways
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for path in braceexpand.braceexpand(pattern):
            is_file = "://" in path or path.startswith("pipe:") or os.path.exists(path)
            matches = [path] if is_file else glob.glob(os.path.expanduser(path))
            if not matches:
                raise ValueError(f"no shard matches {path!r} (in {Path.cwd()}): write the shards first, or correct the path")
            found |= {match if "://" in match or match.startswith("pipe:") else os.path.abspath(match): match for match in matches}
    return sorted(found.values())


def require_a_shard_each(shards: int, ranks: int, num_workers: int) -> None:
    """ValueError when a reader would have no shard: it would wait for ever, or make the other ranks wait."""
    readers = ranks * max(1, num_workers)
    if shards < readers:
        raise ValueError(
            f"{shards} training shards are too few for {ranks} ranks x {max(1, num_workers)} workers = {readers} readers: "
            f"set num_workers to at most {shards // ranks}, use fewer ranks, or write at least {readers} smaller shards"
        )


def _add(tar: tarfile.TarFile, sample: ShardSample) -> int:
    """As webdataset's TarWriter does, byte for byte; importing it would bring PyTorch into every process of a build."""
    text = json.dumps(sample.fields, ensure_ascii=False, sort_keys=True).encode()
    for extension, content in sorted({sample.extension: sample.picture, "mask.png": sample.mask, "json": text}.items()):
        member = tarfile.TarInfo(f"{sample.key}.{extension}")
        member.size, member.mode, member.uname, member.gname = len(content), 0o444, "bigdata", "bigdata"
        tar.addfile(member, io.BytesIO(content))
    return 1


def _part(folder: Path, split: str, wanted: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    part = read_manifest(folder).get(split)
    if part is not None and all(part.get(name) == value for name, value in wanted.items()):
        return part
    others = list(folder.glob(f"{split}-*.tar"))
    if others and not overwrite:
        raise ValueError(f"{folder} holds {split} shards of another seed or configuration: remove them or write elsewhere")
    part = wanted | {"count": 0, "shards": {}}
    for shard in others:  # first: a manifest that is right already is not looked behind again
        shard.unlink()
    write_json(folder / MANIFEST, read_manifest(folder) | {split: part})
    return part


def _is_finished(path: Path, entry: dict[str, Any] | None) -> bool:
    return entry is not None and path.is_file() and sha256(path) == entry["sha256"]
