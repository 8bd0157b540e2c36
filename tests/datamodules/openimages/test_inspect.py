"""The page: its numbers are the manifest's and the index's, its pictures are in it, and what is odd comes first."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datamodules.openimages.build import build
from datamodules.openimages.inspect import InspectConfig, histogram, inspect, member, strangeness


@pytest.fixture
def built(plain_bucket, config_of):
    config = config_of(plain_bucket)
    build(config)
    return Path(config.out)


def test_the_page_is_self_contained_and_its_numbers_are_the_manifests(built):
    inspect(InspectConfig(str(built), random=5, strange=4))
    page = (built.parent / "inspect-train.html").read_text()
    index = pd.read_parquet(built / "train-index.parquet")
    assert "train: 40 triplets in 3 shards" in page and page.count('src="data:image/jpeg;base64,') == 9
    assert not re.search(r'(src|href)="(?!data:)', page)
    for label, count in index.label.value_counts().items():
        assert re.search(rf"<span>{label}</span><i style=[^>]*></i><b>{count}</b>", page)


def test_members_are_read_by_offset(built):
    row = pd.read_parquet(built / "train-index.parquet").iloc[20]
    with (built / row.shard).open("rb") as file:
        assert member(file, int(row.picture_offset)).startswith(b"\xff\xd8") and member(file, int(row.json_offset)).endswith(b"}")


def test_the_strangest_is_the_one_that_differs(built):
    index = pd.read_parquet(built / "train-index.parquet")
    index.loc[7, ["width", "height"]] = (960, 96)
    odd = strangeness(index)
    assert odd.max(axis=1).idxmax() == 7 and odd.loc[7].idxmax() == "shape of the picture"


def test_histograms_lose_nothing():
    bars = histogram(pd.Series([-1.0, 0.2, 0.5, 99.0]), np.array([0.0, 0.5, 1.0]))
    assert [bar["count"] for bar in bars] == [2, 2]


def test_a_folder_or_split_that_is_not_there_is_named(built, tmp_path):
    with pytest.raises(FileNotFoundError, match="manifest.json is missing"):
        inspect(InspectConfig(str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="no split 'test'"):
        inspect(InspectConfig(str(built), split="test"))
