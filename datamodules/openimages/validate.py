"""`make validate-data`: is every shard what its manifest says, and every sample one that training can use?"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from datamodules import pictures
from datamodules import shards as sharding
from datamodules.dreambooth import DreamBooth, load_picture
from datamodules.openimages.assemble import member_offsets
from datamodules.openimages.config import RunConfig
from datamodules.openimages.engine import Engine, Stage
from datamodules.openimages.perceptual import Lookalikes, perceptual_hash
from datamodules.samples import BadSampleError, BadSamples, decode, read_shards

SHOWN = 50


@dataclass
class ValidateConfig:
    """Which shards are checked, and against what.

    shards: a folder with a manifest. dreambooth: a folder of evaluation pictures, none of which may be among the samples (None: not
        looked for). leak_bits: pictures whose 64-bit perceptual hashes differ in at most so many are one.
    workers: processes, see RunConfig; 0 is this one. Samples are decoded and cut as for training at `image_size`.
    """

    shards: str = "runs/openimages/data/shards"
    dreambooth: str | None = None
    leak_bits: int = 6
    image_size: int = 512
    workers: int | None = RunConfig.workers


def validate(config: ValidateConfig) -> int:
    """Print a verdict with the names of what is bad; 0 when all is well, else 1. Raises FileNotFoundError for no manifest."""
    folder = Path(config.shards).absolute()
    manifest = sharding.read_manifest(folder)
    if not manifest:
        raise FileNotFoundError(f"{folder / sharding.MANIFEST} is missing: {folder} holds no shards that were built here, with a manifest of what is in them")
    entries = [{"shard": name, "index": part.get("index"), **entry} for part in manifest.values() for name, entry in part["shards"].items()]
    with Engine(config.workers) as engine:
        found = sorted(engine.run(entries, [Stage(CheckShard, (folder, config.image_size))]), key=lambda item: item["shard"])
    problems = [problem for item in found for problem in item["problems"]]
    samples = [sample for item in found for sample in item["samples"]]
    problems += [problem for split, part in manifest.items() for problem in check_split(folder, split, part)]
    problems += [*unlisted(folder, entries), *duplicates(samples), *leaks(samples, config)]
    print_verdict(problems, len(samples), len(entries), config.dreambooth)
    return 1 if problems else 0


class CheckShard:
    """A stage: item {"shard", "count", "sha256", "index"} -> problems (lines of text) and samples (shard, key, digest, hash)."""

    def __init__(self, folder: Path, image_size: int):
        self.folder, self.image_size = folder, image_size

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        path, problems = self.folder / item["shard"], []
        if not path.is_file():
            return item | {"problems": [f"{path.name}: the shard is missing"], "samples": []}
        if sharding.sha256(path) != item["sha256"]:
            problems.append(f"{path.name}: its sha256 is not the manifest's")
        samples = []
        try:
            for sample in read_shards([str(path)], BadSamples(self.folder / "bad.log", "raise")):
                problems += [f"{path.name} {sample['__key__']}: {problem}" for problem in check_sample(sample, self.image_size)]
                samples.append(_summary(path.name, sample))
            if item["index"]:
                problems += check_index(self.folder / item["index"], path, samples)
        except BadSampleError as error:
            problems.append(str(error))
        if len(samples) != item["count"]:
            problems.append(f"{path.name}: {len(samples)} samples can be read, the manifest says {item['count']}")
        return item | {"problems": problems, "samples": samples}


def check_sample(sample: dict[str, Any], image_size: int) -> Iterator[str]:
    """What is wrong with an undecoded sample: not usable in training, a mask of another size, an empty field of the licence."""
    try:
        decode(sample, image_size)
        picture = pictures.open_picture(picture_of(sample))
        mask = pictures.open_mask(sample["mask.png"])
    except BadSampleError as error:
        yield str(error)
        return
    if mask.size != picture.size:
        yield f"mask of {mask.size[0]}x{mask.size[1]} beside a picture of {picture.size[0]}x{picture.size[1]}"
    fields = json.loads(sample["json"])
    yield from (f"the field {name!r} is missing" for name in sharding.REQUIRED_FIELDS if not fields.get(name))


def check_index(index: Path, shard: Path, samples: list[dict[str, Any]]) -> Iterator[str]:
    """Where a split's index says something else than the shard: its samples, their digests, where their files begin."""
    if rows_of(index) is None:
        return
    lines = pq.read_table(index, filters=[("shard", "==", shard.name)]).to_pylist()
    listed, places = {line["key"]: line for line in lines}, member_offsets(shard)
    for sample in samples:
        line = listed.pop(sample["key"], None)
        if line is None:
            yield f"{shard.name} {sample['key']}: is not in {index.name}"
        elif line["sha256"] != sample["digest"] or any(line[name] != place for name, place in places[sample["key"]].items()):
            yield f"{shard.name} {sample['key']}: {index.name} has another digest or place of it"
    yield from (f"{shard.name} {key}: is in {index.name}, but not in the shard" for key in listed)


def check_split(folder: Path, split: str, part: dict[str, Any]) -> Iterator[str]:
    """What its shards cannot tell of a split: that there are none, and what its index has beside their samples."""
    if not part["count"]:
        yield f"{split}: has no samples"
    if "index" not in part:
        return
    index = folder / part["index"]
    if (rows := rows_of(index)) is None:
        yield f"{index.name}: the index {'cannot be read' if index.is_file() else 'is missing'}"
    elif rows != part["count"]:
        yield f"{index.name}: {rows} rows, the manifest says {part['count']}"


def rows_of(index: Path) -> int | None:
    try:
        return pq.read_metadata(index).num_rows
    except (OSError, pa.ArrowException):
        return None


def duplicates(samples: list[dict[str, Any]]) -> Iterator[str]:
    """Keys and contents (picture and mask) that occur more than once."""
    for name in ("key", "digest"):
        places = defaultdict(list)
        for sample in samples:
            places[sample[name]].append(f"{sample['shard']} {sample['key']}")
        yield from (f"the same {name}: {', '.join(where)}" for where in places.values() if len(where) > 1)


def leaks(samples: list[dict[str, Any]], config: ValidateConfig) -> Iterator[str]:
    """Samples that look like a picture of the evaluation."""
    if config.dreambooth is None:
        return
    seen = Lookalikes(config.leak_bits)
    for subject in DreamBooth(config.dreambooth).subjects:
        for path in subject.images:
            seen.add(perceptual_hash(load_picture(path)), f"{subject.name}/{path.name}")
    for sample in samples:
        other = seen.find(int(sample["hash"], 16)) if sample["hash"] else None
        if other is not None:
            yield f"{sample['shard']} {sample['key']}: looks like the evaluation's {other}"


def unlisted(folder: Path, entries: list[dict[str, Any]]) -> Iterator[str]:
    listed = {entry["shard"] for entry in entries}
    yield from (f"{path.name}: in no manifest" for path in sorted(folder.glob("*.tar")) if path.name not in listed)


def print_verdict(problems: list[str], samples: int, shards: int, dreambooth: str | None) -> None:
    for problem in problems[:SHOWN]:
        print(problem)
    if len(problems) > SHOWN:
        print(f"... and {len(problems) - SHOWN} more")
    unsought = "" if dreambooth else "; pictures of the evaluation were not looked for (--dreambooth FOLDER)"
    print(f"{'BAD' if problems else 'GOOD'}: {samples} samples in {shards} shards, {len(problems)} problems{unsought}")


def _summary(shard: str, sample: dict[str, Any]) -> dict[str, Any]:
    content = picture_of(sample)
    try:
        value = f"{perceptual_hash(pictures.open_picture(content)):016x}"
    except pictures.PICTURE_ERRORS:
        value = ""
    return {"shard": shard, "key": sample["__key__"], "digest": sha256(content + sample.get("mask.png", b"")).hexdigest(), "hash": value}


def picture_of(sample: dict[str, Any]) -> bytes:
    """The picture's file of an undecoded sample; b"" where it has none."""
    return next((sample[extension] for extension in sharding.PICTURE_EXTENSIONS if extension in sample), b"")
