"""`make validate-data`: is every shard what its manifest says, and every sample one that training can use?"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from datamodules import pictures
from datamodules import shards as sharding
from datamodules.dreambooth import DreamBooth, load_picture
from datamodules.openimages.config import RunConfig
from datamodules.openimages.engine import Engine, Stage
from datamodules.openimages.perceptual import Lookalikes, perceptual_hash
from datamodules.samples import PICTURE_EXTENSIONS, BadSampleError, BadSamples, decode, read_shards

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
        raise FileNotFoundError(f"{folder / sharding.MANIFEST} is missing: {folder} is no folder of shards")
    entries = [{"shard": name, **entry} for part in manifest.values() for name, entry in part["shards"].items()]
    with Engine(config.workers) as engine:
        found = sorted(engine.run(entries, [Stage(CheckShard, (folder, config.image_size))]), key=lambda item: item["shard"])
    problems = [problem for item in found for problem in item["problems"]]
    samples = [sample for item in found for sample in item["samples"]]
    problems += [*unlisted(folder, entries), *duplicates(samples), *leaks(samples, config)]
    print_verdict(problems, len(samples), len(entries))
    return 1 if problems else 0


class CheckShard:
    """A stage: item {"shard", "count", "sha256"} -> problems (lines of text) and samples (shard, key, digest, hash)."""

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
        except BadSampleError as error:
            problems.append(str(error))
        if len(samples) != item["count"]:
            problems.append(f"{path.name}: {len(samples)} samples can be read, the manifest says {item['count']}")
        return item | {"problems": problems, "samples": samples}


def check_sample(sample: dict[str, Any], image_size: int) -> Iterator[str]:
    """What is wrong with an undecoded sample: not usable in training, a mask of another size, an empty field of the licence."""
    try:
        decode(sample, image_size)
        picture = pictures.open_picture(_content(sample))
        mask = pictures.open_mask(sample["mask.png"])
    except BadSampleError as error:
        yield str(error)
        return
    if mask.size != picture.size:
        yield f"mask of {mask.size[0]}x{mask.size[1]} beside a picture of {picture.size[0]}x{picture.size[1]}"
    fields = json.loads(sample["json"])
    yield from (f"the field {name!r} is missing" for name in sharding.REQUIRED_FIELDS if not fields.get(name))


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


def print_verdict(problems: list[str], samples: int, shards: int) -> None:
    for problem in problems[:SHOWN]:
        print(problem)
    if len(problems) > SHOWN:
        print(f"... and {len(problems) - SHOWN} more")
    print(f"{'BAD' if problems else 'GOOD'}: {samples} samples in {shards} shards, {len(problems)} problems")


def _summary(shard: str, sample: dict[str, Any]) -> dict[str, Any]:
    content = _content(sample)
    try:
        value = f"{perceptual_hash(pictures.open_picture(content)):016x}"
    except pictures.PICTURE_ERRORS:
        value = ""
    return {"shard": shard, "key": sample["__key__"], "digest": sha256(content + sample.get("mask.png", b"")).hexdigest(), "hash": value}


def _content(sample: dict[str, Any]) -> bytes:
    return next((sample[extension] for extension in PICTURE_EXTENSIONS if extension in sample), b"")
