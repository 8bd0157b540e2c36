"""The whole factory in this process: over HTTP with faults, resumed, limited; and captioned by a tiny BLIP-2."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from huggingface_hub import constants
from miniature_bucket import Miniature
from PIL import Image

from datamodules.openimages.assemble import deal, read_light
from datamodules.openimages.build import BuildConfig, build, deciding, with_absolute_paths
from datamodules.openimages.config import CaptionConfig, RunConfig, SelectConfig, ShardConfig, SourcesConfig
from datamodules.openimages.fetch import UnreachableError
from datamodules.openimages.units import SCHEMA, write_rows
from tests.datamodules.openimages.conftest import command, digests


def test_shards_are_balanced_and_indexed(undisturbed, plain_bucket, config_of):
    part, _ = undisturbed
    assert [shard["count"] for shard in part["shards"].values()] == [13, 13, 14] and part["count"] == 40
    config = config_of(plain_bucket)
    build(config)
    index = pd.read_parquet(f"{config.out}/train-index.parquet")
    assert len(index) == 40 and index.key.is_unique and index.sha256.is_unique
    row = index.iloc[17]
    with open(f"{config.out}/{row.shard}", "rb") as file:
        file.seek(row.json_offset)
        assert file.read(4096).startswith(b'{"area"')
        file.seek(row.picture_offset)
        assert file.read(2) == b"\xff\xd8"


def test_the_index_says_what_the_samples_say(plain_bucket, config_of):
    config = config_of(plain_bucket)
    build(config)
    index = {row["key"]: row for row in pd.read_parquet(f"{config.out}/train-index.parquet").to_dict("records")}
    for shard in sorted(Path(config.out).glob("*.tar")):
        with tarfile.open(shard) as tar:
            files = {member.name: (member.offset_data, tar.extractfile(member).read()) for member in tar}
        for key in {name.partition(".")[0] for name in files}:
            (picture_at, picture), (mask_at, mask), (json_at, text) = (files[f"{key}.{extension}"] for extension in ("jpg", "mask.png", "json"))
            places = {"picture_offset": picture_at, "mask_offset": mask_at, "json_offset": json_at}
            row = index.pop(key) | {}
            assert row["box"].tolist() == json.loads(text)["box"]
            assert row == json.loads(text) | places | {"box": row["box"], "shard": shard.name, "key": key, "sha256": hashlib.sha256(picture + mask).hexdigest()}
            image, inside = Image.open(io.BytesIO(picture)), np.asarray(Image.open(io.BytesIO(mask))) > 0
            assert (row["width"], row["height"]) == image.size and row["area"] == pytest.approx(inside.mean(), abs=0.01)
            assert row["license"] == "https://creativecommons.org/licenses/by/2.0/" and row["author"].startswith("Author ")
            assert row["url"] == f"https://example.org/{row['image_id']}" and row["predicted_iou"] == 0.9 and row["label"] in row["caption"]
    assert not index


def test_workers_are_told_absolute_paths_and_the_configuration_stays_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("blip2", "own"):
        (tmp_path / name).mkdir()
    (tmp_path / "captions.csv").write_text("ImageID,caption\n")
    (tmp_path / "own/words.txt").write_text("mauve\n")
    given = BuildConfig(sources=SourcesConfig("annotations", "https://there/pictures", captions="captions.csv"),
                        captions=CaptionConfig(init_args={"model": "blip2"}, word_lists=["colors.txt", "own/words.txt"], people_words=None))
    before, told = deciding(given), with_absolute_paths(given)
    assert told.sources == replace(given.sources, annotations=f"{tmp_path}/annotations", captions=f"{tmp_path}/captions.csv")
    assert told.captions.init_args == {"model": f"{tmp_path}/blip2"} and told.captions.word_lists == ["colors.txt", f"{tmp_path}/own/words.txt"]
    assert deciding(given) == before and with_absolute_paths(BuildConfig()) == BuildConfig()


def test_deal_is_even():
    for count in (0, 1, 15, 16, 31, 282_000):
        sizes = [len(part) for part in deal(count, 15)]
        assert sum(sizes) == count and max(sizes, default=0) <= 15 and max(sizes, default=0) - min(sizes, default=0) <= 1


def test_over_http_with_faults_the_same_bytes_come_out(undisturbed, plain_bucket, config_of, serve):
    bucket = serve(plain_bucket)
    pictures = sorted((plain_bucket / "pictures/train").iterdir())
    for i, fault in enumerate((503, "cut", 429, "garbled")):
        bucket.faults[f"pictures/train/{pictures[i].name}"] = [fault, fault]
    bucket.faults["annotations/v5/train-annotations-object-segmentation.csv"] = ["cut", 500]
    config = config_of(plain_bucket, url=bucket.url)
    build(config)
    assert digests(config) == undisturbed[1]


def test_a_dead_server_stops_the_run_and_the_next_one_goes_on(undisturbed, plain_bucket, config_of, serve):
    bucket = serve(plain_bucket)
    picture = sorted((plain_bucket / "pictures/train").iterdir())[5]
    bucket.faults[f"pictures/train/{picture.name}"] = [503] * 4
    config = config_of(plain_bucket, url=bucket.url)
    with pytest.raises(UnreachableError, match=rf"{picture.name}.*run again"):
        build(config)
    bucket.requests.clear()
    build(config)
    assert digests(config) == undisturbed[1]
    assert not any(path.endswith(".csv") for path, _ in bucket.requests)


@pytest.mark.parametrize("answered", [0, 1, 4])  # requests before the server fails: at the size of the zip, at its end, in its directory
def test_a_mask_zip_that_is_not_served_stops_the_run_and_spoils_no_unit(undisturbed, plain_bucket, config_of, serve, answered):
    """Its masks are not broken: had they been counted so, the finished unit would keep that for ever."""
    bucket = serve(plain_bucket)
    digit = min(path.name for path in (plain_bucket / "pictures/train").iterdir())[0]
    bucket.faults[f"annotations/v5/train-masks/train-masks-{digit}.zip"] = [None] * answered + [503] * 4
    config = config_of(plain_bucket, url=bucket.url)
    with pytest.raises(UnreachableError, match=rf"train-masks-{digit}.zip: HTTP 503.*run again"):
        build(config)
    build(config)
    assert digests(config) == undisturbed[1]


def test_what_is_not_served_is_counted_where_the_user_wants_that(plain_bucket, config_of, serve, counted):
    bucket = serve(plain_bucket)
    digit = min(path.name for path in (plain_bucket / "pictures/train").iterdir())[0]
    bucket.faults[f"annotations/v5/train-masks/train-masks-{digit}.zip"] = [503] * 1000
    config = config_of(plain_bucket, url=bucket.url)
    config.sources.fetch.on_unreachable = "skip"
    found = counted(build(config))
    assert found["mask_unreachable"] == sum(path.name[0] == digit for path in (plain_bucket / "pictures/train").iterdir())
    assert found["triplets"] == 40 - found["mask_unreachable"]


def test_what_a_run_went_without_the_next_one_fetches(undisturbed, plain_bucket, config_of, serve):
    bucket = serve(plain_bucket)
    names = sorted(path.name for path in (plain_bucket / "pictures/train").iterdir())
    bucket.faults[f"annotations/v5/train-masks/train-masks-{names[0][0]}.zip"] = [503] * 1000
    bucket.faults[f"pictures/train/{names[-1]}"] = [503] * 1000
    config = config_of(plain_bucket, url=bucket.url)
    config.sources.fetch.on_unreachable = "skip"
    assert build(config)["count"] < 39
    bucket.faults.clear()
    config.sources.fetch.on_unreachable = "raise"
    assert build(config)["count"] == 40
    assert digests(config) == undisturbed[1]


def test_killed_while_it_removes_its_work(undisturbed, plain_bucket, config_of, monkeypatch):
    config, remove = config_of(plain_bucket, limit=11, run=RunConfig(workers=0, unit=8, keep_work=False)), shutil.rmtree

    def killed(folder, **options):
        if (folder / "units").exists():
            remove(folder / "units")
            raise KeyboardInterrupt
        remove(folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            build(config)
    whole = replace(config, limit=None)
    build(whole)
    assert digests(whole) == undisturbed[1] and not list((Path(config.out) / "work").glob("*train-*"))


def test_finished_shards_are_not_made_again_and_damaged_ones_are(undisturbed, plain_bucket, config_of):
    config = config_of(plain_bucket)
    build(config)
    shard = Path(config.out) / "train-00001.tar"
    before = {p: p.stat().st_mtime_ns for p in Path(config.out).glob("*.tar")}
    build(config)
    assert before == {p: p.stat().st_mtime_ns for p in Path(config.out).glob("*.tar")}
    shard.write_bytes(shard.read_bytes()[:-2000])
    build(config)
    assert digests(config) == undisturbed[1]
    assert [p.name for p in before if p.stat().st_mtime_ns != before[p]] == [shard.name]


def test_a_limit_is_the_beginning_of_the_whole_and_everything_is_counted(undisturbed, plain_bucket, config_of, counted):
    config = config_of(plain_bucket, limit=11, shards=ShardConfig(samples_per_shard=100))
    assert counted(build(config)) == {"masks": 40, "triplets": 11, "not_looked_at": 29}
    whole = config_of(plain_bucket, "whole", shards=ShardConfig(samples_per_shard=100))
    build(whole)
    keys = [pd.read_parquet(f"{c.out}/train-index.parquet").key.tolist() for c in (config, whole)]
    assert keys[0] == keys[1][:11]
    larger = replace(config, limit=30)
    build(larger)
    assert pd.read_parquet(f"{larger.out}/train-index.parquet").key.tolist() == keys[1][:30]


def test_another_seed_is_another_order_and_leaves_no_old_shard(plain_bucket, config_of):
    config = config_of(plain_bucket)
    build(config)
    first = pd.read_parquet(f"{config.out}/train-index.parquet").key.tolist()
    other = replace(config, seed=1, shards=ShardConfig(samples_per_shard=40))
    with pytest.raises(ValueError, match=r"holds the finished split train of other options \(seed, shards.samples_per_shard\)"):
        build(other)
    with pytest.raises(ValueError, match=r"other options \(limit\)"):
        build(replace(config, limit=1))
    assert pd.read_parquet(f"{config.out}/train-index.parquet").key.tolist() == first
    build(replace(other, run=replace(other.run, overwrite=True)))
    assert [p.name for p in Path(config.out).glob("*.tar")] == ["train-00000.tar"]
    second = pd.read_parquet(f"{config.out}/train-index.parquet").key.tolist()
    assert sorted(first) == sorted(second) and first != second


def test_hashes_are_read_back_exactly(tmp_path):
    rows = [dict.fromkeys(SCHEMA.names) | {"key": "a", "hash": 2**64 - 3}, dict.fromkeys(SCHEMA.names) | {"key": "b", "reason": "mask_empty"}]
    write_rows(tmp_path / "00000.parquet", rows)
    assert next(read_light(tmp_path, 1)).hash.tolist()[0] == 2**64 - 3


def test_a_configuration_that_cannot_work_says_so(plain_bucket, config_of):
    with pytest.raises(ValueError, match="limit must be at least 1"):
        build(config_of(plain_bucket, limit=0))
    for part, options in ((ShardConfig, {"samples_per_shard": 0}), (SelectConfig, {"near_duplicate_bits": 64})):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
            part(**options)
    config = config_of(plain_bucket, "elsewhere")
    config.sources.masks = "v5/nothing.csv"
    with pytest.raises(FileNotFoundError, match=r"nothing.csv is missing: sources.masks"):
        build(config)


def test_no_triplet_at_all_is_an_error_that_names_the_filters(undisturbed, plain_bucket, config_of, tmp_path):
    config = config_of(plain_bucket)
    build(config)
    for select, said in ((SelectConfig(min_predicted_iou=2.0), "low_predicted_iou 40"), (SelectConfig(min_side=1000), "picture_too_small 40")):
        with pytest.raises(ValueError, match=f"no triplet of train is left: masks that went, by the reason: {said}$"):
            build(replace(config, select=select, run=replace(config.run, overwrite=True)))
    assert digests(config) == undisturbed[1], "what was there stays"
    with pytest.raises(ValueError, match="no triplet of train is left: v5/train-annotations-object-segmentation.csv of .* has no rows"):
        build(config_of(Miniature.drawn(0).write(tmp_path / "empty"), "nothing"))


def test_unknown_keys_are_errors(tmp_path, plain_bucket, config_of):
    run = command(config_of(plain_bucket), tmp_path / "data.yaml")
    done = subprocess.run([*run, "--select.min_aria", "0.1"], capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and "min_aria" in done.stderr


def test_a_captioner_that_is_not_there_is_named_with_the_command_that_fetches_it(tmp_path, config_of, monkeypatch):
    """It is asked for while a unit is being written; its error is not taken for the disk's."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    config = config_of(Miniature.drawn(2).write(tmp_path / "bucket"), captions=False)
    config.captions.init_args = {"model": "owner/missing@v1"}
    with pytest.raises(FileNotFoundError, match=r"owner/missing@v1 could not be loaded .*\n.*moma_lightning fetch --models owner/missing@v1"):
        build(config)
    assert not list(Path(config.out).rglob(".*.parquet"))


def test_captions_of_a_tiny_blip2(tmp_path, config_of):
    """The real class and the real processor at a small size, with random weights: words are noise, the label stands in all the same."""
    blip2 = pytest.importorskip("tests.datamodules.openimages.tiny_blip2")
    folder = blip2.save(tmp_path / "blip2")
    root = Miniature.drawn(6).write(tmp_path / "bucket")
    config = config_of(root, captions=False)
    config.captions.init_args, config.captions.batch_size = {"model": str(folder), "max_new_tokens": 8}, 4
    part = build(config)
    index = pd.read_parquet(f"{config.out}/train-index.parquet")
    assert part["count"] == 6 and index.caption_full.str.len().gt(0).all()
    assert all(label in caption for label, caption in zip(index.label, index.caption, strict=True))
    again = replace(config, out=str(tmp_path / "again"))
    build(again)
    assert digests(again) == digests(config)
    assert json.loads(Path(f"{config.out}/manifest.json").read_text())["train"]["versions"]["transformers"]
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match="of other options \\(captioner_files.model\\)"):
        build(config)
