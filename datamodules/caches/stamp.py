"""What a cached shard was made from and with: a JSON file beside each, which training holds against what it would use itself.

A shard of a cache is finished when this file is there, and its own length is what the file says. A cache is finished when all shards
that its list names are.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datamodules.shards import sha256
from moma_lightning.files import write_json

#: The names of all shards that a cache is to hold, written before the first of them.
LIST = "shards.json"


@dataclass(frozen=True)
class CacheStamp:
    """source: the shard of pictures; source_sha256, source_size, source_mtime_ns: its digest, size in bytes and time of its last change.
    made_by: what the features depend on, by name (`TrainedPartModule.cache_identity`). image_size: side of the pictures in pixels.
    views: 2 where every sample is there mirrored as well. samples, size: of the cached shard, size in bytes. left_out: samples of the
    source that could not be used.
    """

    source: str
    source_sha256: str
    made_by: dict[str, str]
    image_size: int
    views: int
    dtype: str
    samples: int = 0
    left_out: int = 0
    size: int = 0
    source_size: int = field(default=-1, compare=False)
    source_mtime_ns: int = field(default=-1, compare=False)

    @staticmethod
    def path(shard: str | Path) -> Path:
        return Path(shard).with_suffix(".json")

    def write(self, shard: Path) -> None:
        write_json(self.path(shard), asdict(self))

    @classmethod
    def read(cls, shard: str | Path) -> "CacheStamp | None":
        """The stamp beside `shard`, or None where there is none: a shard of pictures. Raises ValueError for one that cannot be read."""
        path = cls.path(shard)
        if "://" in str(shard) or not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is beside {shard} and no JSON ({error}): make the cache again, or move a file that is not its") from error
        if not isinstance(content, dict) or not {"made_by", "source_sha256"} <= content.keys():
            return None  # somebody's own
        try:
            return cls(**_of_before(content))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not the stamp of a cached shard that is known here ({error}): make the cache again") from error


def _of_before(content: dict[str, Any]) -> dict[str, Any]:
    """An option at None is not in a stamp now; it once was there as "None"."""
    return content | {"made_by": {name: value for name, value in content["made_by"].items() if value != "None"}}


def source_state(source: Path, stamp: CacheStamp | None) -> dict[str, Any]:
    """The stamp's fields of a source as it is now. Its digest is `stamp`'s where size and time are: reading it all takes long."""
    size, time = source.stat().st_size, source.stat().st_mtime_ns
    if stamp is not None and (stamp.source, stamp.source_size, stamp.source_mtime_ns) == (str(source), size, time):
        digest = stamp.source_sha256
    else:
        digest = sha256(source)
    return {"source": str(source), "source_sha256": digest, "source_size": size, "source_mtime_ns": time}


def read_stamps(shards: Sequence[str], image_size: int, flip: bool) -> dict[str, CacheStamp]:
    """Stamps by shard; empty for shards of pictures.

    Raises ValueError, with the shard's name, for a mixture of both, a shard that is not the one its stamp is about, one whose source
    has changed since, pictures of another size, for `flip` where the mirrored view is missing, and for a cache of which shards are missing or left over.
    """
    stamps = {shard: CacheStamp.read(shard) for shard in shards}
    cached = {shard: stamp for shard, stamp in stamps.items() if stamp is not None}
    if cached and len(cached) < len(stamps):
        raise ValueError(f"{next(s for s in stamps if s not in cached)} has no stamp beside it, {next(iter(cached))} has: shards of pictures and of a cache "
                         "cannot be mixed, and an unfinished cache has to be finished first")
    for folder in {Path(shard).parent for shard in cached}:
        require_whole(folder, {Path(shard).name for shard in cached if Path(shard).parent == folder})
    for shard, stamp in cached.items():
        if (why := _unfit(shard, stamp, image_size, flip)) is not None:
            raise ValueError(f"{shard}: {why}: make the cache again, or train on the pictures")
    return cached


def require_whole(folder: Path, matched: set[str]) -> None:
    """ValueError unless every shard that the cache is to hold is finished, and `matched` are among them."""
    path = folder / LIST
    wanted = set(json.loads(path.read_text())) if path.is_file() else set()
    if lacking := sorted(name for name in wanted if not CacheStamp.path(folder / name).is_file()):
        raise ValueError(f"{folder} lacks {len(lacking)} of the {len(wanted)} shards that it is to hold, {lacking[0]} among them: finish the cache first")
    if left := sorted(matched - wanted):
        raise ValueError(f"{folder / left[0]} is not among the shards in {path}: it is of an earlier cache, make the cache again")


def _unfit(shard: str, stamp: CacheStamp, image_size: int, flip: bool) -> str | None:
    if Path(shard).stat().st_size != stamp.size:
        return f"is {Path(shard).stat().st_size} bytes long, its stamp tells of {stamp.size}"
    source = Path(stamp.source)
    if source.is_file() and source_state(source, stamp)["source_sha256"] != stamp.source_sha256:
        return f"its source {source} has changed since"
    if stamp.image_size != image_size:
        return f"was made of pictures of {stamp.image_size} pixels, training wants {image_size}"
    if flip and stamp.views < 2:
        return "has no mirrored views, which flip=true needs"
    return None
