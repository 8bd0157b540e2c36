"""A build gives the same triplets wherever the files come from, and whatever the network does to them."""

import hashlib
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from miniature_bucket import Miniature

from datamodules.openimages.build import build
from datamodules.openimages.config import SelectConfig
from datamodules.openimages.fetch import UnreachableError
from datamodules.samples import BadSamples, decode, read_shards


def outcome(config) -> tuple[list[str], pd.DataFrame]:
    """The shards' digests, and the index without their names, in which the split's stands."""
    out = Path(config.out)
    index = pd.read_parquet(out / f"{config.split}-index.parquet").drop(columns="shard")
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.tar"))], index


def assert_same(config, undisturbed) -> None:
    shards, index = outcome(config)
    assert shards == undisturbed[0]
    pd.testing.assert_frame_equal(index, undisturbed[1])


@pytest.fixture(scope="module")
def undisturbed(plain_bucket, tmp_path_factory):
    """What a build from local files writes."""
    from tests.datamodules.openimages.conftest import config_of as fixture

    config = fixture.__wrapped__(tmp_path_factory.mktemp("undisturbed"))(plain_bucket)
    build(config)
    return outcome(config)


def validation(plain_bucket, tmp_path, config_of, serve):
    return replace(config_of(Miniature.drawn(40, split="validation").write(tmp_path / "bucket")), split="validation")


def tars(plain_bucket, tmp_path, config_of, serve):
    """As OpenImages' own: one of each first digit, the pictures in a folder."""
    for path in sorted((plain_bucket / "pictures/train").iterdir()):
        with tarfile.open(tmp_path / f"train_{path.name[0]}.tar", "a") as tar:
            tar.add(path, f"train_{path.name[0]}/{path.name}")
    config = config_of(plain_bucket)
    return replace(config, sources=replace(config.sources, pictures=str(tmp_path / "train_*.tar")))


def whole_zips(plain_bucket, tmp_path, config_of, serve):
    config = config_of(plain_bucket, url=serve(plain_bucket).url)
    return replace(config, sources=replace(config.sources, download_mask_zips=True))


def redirected(plain_bucket, tmp_path, config_of, serve):
    config = config_of(plain_bucket, url=f"{serve(plain_bucket).url}/moved")
    return replace(config, sources=replace(config.sources, captions=config.sources.annotations.replace("annotations", "captions.csv")))


def garbled_ranges(plain_bucket, tmp_path, config_of, serve):
    """A wrong byte in every third answer of which a mask zip is read: in its directory, and in members."""
    bucket = serve(plain_bucket)
    for path in (plain_bucket / "annotations/v5/train-masks").iterdir():
        bucket.faults[f"annotations/v5/train-masks/{path.name}"] = [None, None, "garbled"] * 30
    return config_of(plain_bucket, url=bucket.url)


@pytest.mark.parametrize("elsewhere", [validation, tars, whole_zips, redirected, garbled_ranges])
def test_the_same_triplets_come_from(elsewhere, undisturbed, plain_bucket, tmp_path, config_of, serve):
    config = elsewhere(plain_bucket, tmp_path, config_of, serve)
    build(config)
    assert_same(config, undisturbed)


def test_a_zip_that_is_not_served_any_more_at_any_of_its_requests_stops_the_run_and_spoils_no_unit(undisturbed, plain_bucket, config_of, serve):
    """From the first, for its size, to the last, for a member; a run after it gives what an undisturbed one does."""
    digit = min(path.name for path in (plain_bucket / "pictures/train").iterdir())[0]
    name = f"annotations/v5/train-masks/train-masks-{digit}.zip"
    bucket = serve(plain_bucket)
    build(config_of(plain_bucket, "before", url=bucket.url))
    asked = sum(path == name for path, _ in bucket.requests)
    config = config_of(plain_bucket, url=bucket.url)
    bucket.faults[name] = [None] * (asked - 1) + [503] * 4
    with pytest.raises(UnreachableError, match=rf"train-masks-{digit}.zip: HTTP 503.*run again, or set"):
        build(config)
    build(config)
    assert_same(config, undisturbed)


def test_another_servers_files_are_not_taken_for_the_first_ones(undisturbed, plain_bucket, config_of, serve, tmp_path):
    """In one folder: what the first build fetched stays there."""
    other = Miniature.drawn(6, first=100).write(tmp_path / "other")
    first, second = (config_of(root, url=serve(root).url) for root in (other, plain_bucket))
    build(first)
    second.run.overwrite = True
    build(second)
    assert_same(second, undisturbed)


REAL = os.environ.get("MOMA_DREAMBOOTH")


@pytest.mark.skipif(REAL is None, reason="set MOMA_DREAMBOOTH to a copy of google/dreambooth to build from real photographs")
def test_real_photographs_come_through(tmp_path, config_of, counted):
    made = Miniature.photographed(Path(REAL))
    count = len(made.pictures)
    config = config_of(made.write(tmp_path / "bucket"))
    assert counted(build(config)) == {"masks": count, "triplets": count}
    triplets = [decode(sample, 64) for sample in read_shards(sorted(map(str, tmp_path.glob("shards/*.tar"))), BadSamples(tmp_path / "bad.log", "raise"))]
    assert len(triplets) == count and all(0.2 < triplet.subject_mask.mean() < 0.4 for triplet in triplets)
    index = pd.read_parquet(f"{config.out}/train-index.parquet")
    assert index.area.between(0.27, 0.3).all() and set(index.label) <= {name.lower() for name in made.names.values()}
    found = counted(build(config_of(tmp_path / "bucket", "unlike", select=SelectConfig())))
    assert found["triplets"] > 0.9 * count, found  # views of one thing are no near-duplicates
