"""From finished units to shards, their index and the manifest: near-duplicates out, cut at the limit, spread evenly."""

import json
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules import shards as sharding
from datamodules.openimages.perceptual import Lookalikes
from datamodules.openimages.units import path_of, read_rows
from moma_lightning.files import write_beside, write_json

SOURCE = "openimages-v7"
#: What choosing needs of every row.
LIGHT = ["key", "image_id", "reason", "hash", "note"]
OFFSETS = dict.fromkeys(sharding.PICTURE_EXTENSIONS, "picture_offset") | {"mask.png": "mask_offset", "json": "json_offset"}


@dataclass
class Chosen:
    """Samples in their order (`unit` and `key` of each), how many rows went for which reason, and the kept ones' notes."""

    rows: pd.DataFrame
    reasons: Counter[str]
    notes: Counter[str]

    def __len__(self) -> int:
        return len(self.rows)


def read_light(samples: Path, units: int) -> Iterator[pd.DataFrame]:
    """`LIGHT` of each of the first units, held by Arrow: as floats, hashes would lose their last bits."""
    for unit in range(units):
        yield pq.read_table(path_of(samples, unit), columns=LIGHT).to_pandas(types_mapper=pd.ArrowDtype).assign(unit=unit)


def choose(units: Iterable[pd.DataFrame], limit: int | None, near_duplicate_bits: int | None) -> Chosen:
    """The first `limit` good samples that look like none before them (of another picture). Rows after the last one are not counted."""
    lookalikes = Lookalikes(near_duplicate_bits) if near_duplicate_bits is not None else None
    parts: list[pd.DataFrame] = []
    reasons, notes = Counter[str](), Counter[str]()
    left = limit if limit is not None else sys.maxsize
    for rows in units:
        kept, stop = _choose_of_unit(rows, left, lookalikes, reasons)
        left -= len(kept)
        notes.update(note for note in rows.note.iloc[kept].dropna() if note)
        parts.append(rows.loc[rows.index[kept], ["unit", "key"]])
        if stop < len(rows):
            break
    return Chosen(pd.concat(parts, ignore_index=True), reasons, notes)


def _choose_of_unit(rows: pd.DataFrame, limit: int, lookalikes: Lookalikes | None, reasons: Counter[str]) -> tuple[list[int], int]:
    """Row numbers that are kept, and how many rows were looked at for them; why the others are not is counted in `reasons`."""
    kept: list[int] = []
    for number, (image, reason, value) in enumerate(zip(rows.image_id, rows.reason, rows.hash, strict=True)):
        if len(kept) == limit:
            return kept, number
        if isinstance(reason, str):
            reasons[reason] += 1
            continue
        if lookalikes is not None:
            other = lookalikes.find(int(value))
            if other is not None and other != image:
                reasons["near_duplicate"] += 1
                continue
            if other is None:
                lookalikes.add(int(value), image)
        kept.append(number)
    return kept, len(rows)


def deal(count: int, samples_per_shard: int) -> list[range]:
    """Positions of each shard's samples: as few shards as can be, no two of which differ by more than one sample."""
    shards = -(-count // samples_per_shard)
    edges = [count * number // shards for number in range(shards + 1)] if shards else [0]
    return [range(a, b) for a, b in pairwise(edges)]


class ShardStage:
    """A stage: item {"shard": name, "keys": {unit: keys}} -> count, sha256; writes the shard and `<name>.index.parquet` in work."""

    def __init__(self, work: Path, out: Path):
        self.work, self.out = work, out

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        path, index = self.out / item["shard"], self.work / "index" / f"{item['shard']}.parquet"
        if index.exists() and path.exists():
            entry = json.loads(index.with_suffix(".json").read_text())
            if sharding.sha256(path) == entry["sha256"]:
                return item | entry
        lines: list[dict[str, Any]] = []
        entry = sharding.write_shard(path, self.samples(item, lines))
        offsets = member_offsets(path)
        lines = [line | offsets[line["key"]] for line in lines]
        write_json(index.with_suffix(".json"), entry)
        write_beside(index, lambda beside: pd.DataFrame(lines).to_parquet(beside, index=False))
        return item | entry

    def samples(self, item: dict[str, Any], lines: list[dict[str, Any]]) -> Iterator[sharding.ShardSample]:
        for unit, keys in sorted((int(unit), set(keys)) for unit, keys in item["keys"].items()):
            for rows in read_rows(path_of(self.work / "samples", unit)):
                for row in rows:
                    if row["key"] in keys:
                        line = describe(row)
                        lines.append({"shard": item["shard"], "key": row["key"]} | line | {"sha256": _digest(row)})
                        yield sharding.ShardSample(row["key"], row["picture"], "jpg", row["mask"], line)


def describe(row: dict[str, Any]) -> dict[str, Any]:
    """A sample's JSON, and its line in the index. The licence is the picture's own, as its author gave it."""
    names = ("caption", "caption_full", "label", "image_id", "license", "author", "url", "class_id", "box", "predicted_iou",
             "width", "height", "note")
    return {"source": SOURCE} | {name: row[name] for name in names} | {
        "license": row["license"] or "unknown", "author": row["author"] or "unknown",
        "area": round(row["area"], 6), "border": round(row["border"], 6), "hash": f"{row['hash']:016x}"}


def shard_items(chosen: Chosen, split: str, samples_per_shard: int) -> list[dict[str, Any]]:
    parts = [chosen.rows.iloc[positions.start : positions.stop] for positions in deal(len(chosen), samples_per_shard)]
    return [{"shard": f"{split}-{number:05d}.tar", "keys": {str(unit): keys.tolist() for unit, keys in part.groupby("unit").key}}
            for number, part in enumerate(parts)]


def member_offsets(path: Path) -> dict[str, dict[str, int]]:
    """By key, where each file's bytes begin in a tar: a sample can be read without the rest of its shard."""
    found: dict[str, dict[str, int]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if extension in OFFSETS:
                found.setdefault(key, {})[OFFSETS[extension]] = member.offset_data
    return found


def write_index(work: Path, out: Path, split: str, names: list[str]) -> None:
    """`<out>/<split>-index.parquet`: one row a triplet, in the shards' order, a shard at a time."""
    paths = [work / "index" / f"{name}.parquet" for name in names]
    # A shard without any box, say, has a column of no type.
    schema = pa.unify_schemas([pa.schema([]), *(pq.read_schema(path).remove_metadata() for path in paths)], promote_options="permissive")

    def write(beside: Path) -> None:
        with pq.ParquetWriter(beside, schema) as writer:
            for path in paths:
                writer.write_table(pq.read_table(path).cast(schema))

    write_beside(out / f"{split}-index.parquet", write)


def _digest(row: dict[str, Any]) -> str:
    """Of picture and mask: what tells two samples apart, whatever their captions."""
    return sha256(row["picture"] + row["mask"]).hexdigest()
