"""The miniature bucket on disk and served, and builds from it without Ray."""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from miniature_bucket import Miniature, served

from datamodules.openimages.build import BuildConfig, build
from datamodules.openimages.config import FetchConfig, RunConfig, SelectConfig, ShardConfig, SourcesConfig
from datamodules.samples import BadSamples, read_shards

COUNT = 40


@pytest.fixture(scope="session")
def plain_bucket(tmp_path_factory) -> Path:
    """40 good pictures, one good mask each; not to be changed."""
    return Miniature.drawn(COUNT).write(tmp_path_factory.mktemp("bucket"))


@pytest.fixture
def miniature() -> Miniature:
    """12 pictures to be spoilt before they are written."""
    return Miniature.drawn(12)


@pytest.fixture
def config_of(tmp_path):
    """A configuration over a bucket: local, with its captions, in this process, with bounds that fit small pictures."""
    def make(root: Path, out: str = "shards", url: str | None = None, captions: bool = True, **options) -> BuildConfig:
        base = url or str(root)
        sources = SourcesConfig(f"{base}/annotations", f"{base}/pictures", captions=str(root / "captions.csv") if captions else None,
                                fetch=FetchConfig(backoff=0.001, threads=4, retries=3))
        defaults = dict(select=SelectConfig(min_side=32, near_duplicate_bits=None), shards=ShardConfig(samples_per_shard=15), run=RunConfig(workers=0, unit=8))
        return BuildConfig(out=str(tmp_path / out), sources=sources, **defaults | options)
    return make


@pytest.fixture
def serve():
    """Serves a folder until the test is over."""
    stack = []

    def start(root: Path):
        context = served(root)
        stack.append(context)
        return context.__enter__()
    yield start
    for context in stack:
        context.__exit__(None, None, None)


def reasons(part: dict) -> dict[str, int]:
    """What a manifest's part counts, without zeros."""
    return {line["reason"]: line["count"] for line in part["funnel"] if line["count"]}


def samples_of(config: BuildConfig) -> list[dict]:
    """Undecoded, in the shards' order."""
    return list(read_shards(map(str, sorted(Path(config.out).glob("*.tar"))), BadSamples(Path(config.out) / "bad.log", "raise")))


def digests(config) -> dict[str, str]:
    """Of everything that is written but the manifest, whose paths differ."""
    out = Path(config.out)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted([*out.glob("*.tar"), *out.glob("*.parquet")])}


def written(config) -> dict[str, bytes]:
    out = Path(config.out)
    return {p.name: p.read_bytes() for p in (*out.glob("*.tar"), *out.glob("*.parquet"), out / "manifest.json")}


def command(config, path: Path) -> list[str]:
    path.write_text(yaml.safe_dump(asdict(config)))
    return [sys.executable, "-m", "datamodules.openimages", "build", "--config", str(path)]


@pytest.fixture(scope="module")
def undisturbed(plain_bucket, tmp_path_factory):
    """What an undisturbed local build of the plain bucket writes."""
    config = config_of.__wrapped__(tmp_path_factory.mktemp("undisturbed"))(plain_bucket)
    return build(config), digests(config)


@pytest.fixture
def built(miniature, config_of, tmp_path, counted):
    """Builds the spoilt miniature; returns the funnel's counts."""
    def run(**options):
        return counted(build(config_of(miniature.write(tmp_path / "bucket"), **options)))
    return run


@pytest.fixture
def counted():
    return reasons


@pytest.fixture
def manifest():
    return lambda config: json.loads((Path(config.out) / "manifest.json").read_text())[config.split]
