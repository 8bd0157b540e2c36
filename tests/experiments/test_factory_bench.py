"""The data factory's benchmark builds what it says, and counts every step. Nothing here is timed."""

import json

import pandas as pd
import pytest

from datamodules.openimages import assemble
from datamodules.openimages.build import Builder
from experiments.benchmarks import factory


@pytest.fixture
def restored(monkeypatch):
    """The bench replaces the factory's steps in a process of its own; here they are put back."""
    for owner, name in ((Builder, "units"), (Builder, "finish"), (assemble, "choose")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


def test_a_build_notes_every_step(restored, tmp_path):
    factory.draw(tmp_path / "bucket", 12, 64)
    log = tmp_path / "log.jsonl"
    factory.build(tmp_path / "bucket", tmp_path / "shards", log, 0)
    found = factory.summary(log, 12)
    assert list(found) == list(factory.STEPS) and all(line["megabytes"] > 0 for line in found.values())
    funnel = {line["reason"]: line["count"] for line in json.loads((tmp_path / "shards/manifest.json").read_text())["train"]["funnel"]}
    assert 0 < funnel["triplets"] <= 12
    assert "shards written" in factory.table(12, 0, found, 1.0)


def test_the_main_processs_steps_alone(tmp_path):
    log = tmp_path / "log.jsonl"
    factory.listed(tmp_path, 600, log)
    assert set(factory.summary(log, 600)) == {"start", "units", "choose", "finish"}
    index = pd.read_parquet(tmp_path / "train-index.parquet")
    assert len(index) == 600 and index.key.is_unique


def test_grain_makes_large_pictures_as_heavy_as_photographs(tmp_path):
    factory.draw(tmp_path, 2, 256)
    sizes = [path.stat().st_size for path in (tmp_path / "pictures").rglob("*.jpg")]
    assert len(sizes) == 2 and min(sizes) > 5000


def test_a_summary_adds_up_time_and_takes_the_largest_memory(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [{"step": step, "seconds": seconds, "clock": 2 * seconds, "megabytes": megabytes}
             for step, seconds, megabytes in (("units", 1.0, 5), ("units", 3.0, 4), ("ShardStage", 2.0, 3))]
    log.write_text("\n".join(json.dumps(line) for line in lines))
    found = factory.summary(log, 1000, workers=2)
    assert {step: list(map(round, line.values())) for step, line in found.items()} == {"units": [4, 250, 5, 125], "ShardStage": [2, 500, 3, 500]}
