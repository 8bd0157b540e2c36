"""The page: its numbers are the manifest's and the index's, its pictures are in it, and what is odd comes first."""

import base64
import html
import io
import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from datamodules.mini.export import triplets
from datamodules.openimages.build import build
from datamodules.openimages.inspect import InspectConfig, histogram, inspect, member, read_index, strangeness
from datamodules.shards import read_manifest, write_shards
from moma_lightning.files import write_json


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
    for title, values, last in (("Area of the subject", index.area, 1), ("Length of the caption", index.caption.str.count(" ") + 1, 30),
                                ("Longer side", index[["width", "height"]].max(axis=1), 1152)):
        bars = re.findall(r"<span>(\S+) to (\S+)</span><i style=[^>]*></i><b>(\d+)</b>", page.partition(title)[2].partition("</section>")[0])
        assert float(bars[-1][1]) == last
        assert [int(count) for *_, count in bars] == [values.between(float(low), float(high), inclusive="left").sum() for low, high, _ in bars]
    cards = {re.search(r"train-\d+\.tar (\S+),", card)[1]: html.unescape(card) for card in re.findall("<figure>.*?</figure>", page, re.DOTALL)[:4]}
    odd = strangeness(index).max(axis=1).set_axis(index.key)
    assert list(odd[list(cards)]) == sorted(odd, reverse=True)[:4], "the strangest first"
    for key, row in index.set_index("key").loc[list(cards)].iterrows():
        assert f"<figcaption>{row.caption}<s>{row.caption_full}</s>" in cards[key] and f"{row.label}, area {row.area:.2f}" in cards[key]
        shown, (picture, edge) = pixels(base64.b64decode(re.search('base64,([^"]+)', cards[key])[1])), picture_and_edge(built, row)
        assert np.abs(shown - (255, 0, 90))[edge].mean() < 40 and np.abs(shown - picture)[~edge].mean() < 20, "the mask's outline"


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), float)


def picture_and_edge(folder: Path, row: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """A sample's picture, and which of its pixels lie on either side of the mask's edge."""
    with (folder / row.shard).open("rb") as file:
        picture, mask = (pixels(member(file, int(offset))) for offset in (row.picture_offset, row.mask_offset))
    inside = mask[..., 0] > 0
    return picture, np.logical_or.reduce([np.roll(inside, by, axis) != inside for axis in (0, 1) for by in (-1, 1)])


def test_shards_without_an_index_have_a_page_too(tmp_path):
    write_shards(tmp_path / "shards", "val", 3, partial(triplets, "val"), samples_per_shard=1, seed=0, config={})
    inspect(InspectConfig(str(tmp_path / "shards"), random=2, strange=2))
    page = (tmp_path / "inspect-val.html").read_text()
    assert "val: 3 triplets in 3 shards" in page and page.count('src="data:image/jpeg;base64,') == 4 and "What became of the masks" not in page


def test_what_is_read_from_the_shards_is_what_an_index_says(built):
    index = pd.read_parquet(built / "train-index.parquet")
    found = read_index(built, {"shards": {name: {} for name in sorted(index.shard.unique())}})
    same = ["key", "shard", "label", "caption", "width", "height", "picture_offset", "mask_offset"]
    pd.testing.assert_frame_equal(found[same], index[same], check_dtype=False)
    for name in ("area", "border"):
        assert np.abs(found[name] - index[name]).max() < 0.02, "masks were fitted to their pictures since"


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
    write_json(built / "manifest.json", {"train": read_manifest(built)["train"] | {"count": 0, "shards": {}}})
    with pytest.raises(ValueError, match="the split 'train' has no samples"):
        inspect(InspectConfig(str(built)))
