import io
import json
import os
import tarfile

import pytest
import webdataset as wds

from datamodules import shards
from datamodules.shards import ShardSample, contains_label, expand_shards, require_a_shard_each, write_shard, write_shards
from moma_lightning.files import place_beside

FIELDS = {name: "x" for name in shards.REQUIRED_FIELDS}


class Source:
    """Makes samples, and remembers which were asked for; `fails_at` stands for a kill in the middle of a shard."""

    def __init__(self, fails_at: int | None = None):
        self.asked: list[int] = []
        self.fails_at = fails_at

    def __call__(self, rows):
        for row in rows:
            if row == self.fails_at:
                raise KeyboardInterrupt
            self.asked.append(row)
            yield ShardSample(f"k{row}", b"picture %d" % row, "png", b"mask", FIELDS | {"row": row})


def write(folder, source, **changes):
    options = {"count": 5, "samples_per_shard": 2, "seed": 1, "config": {"size": (8, 8)}} | changes
    return write_shards(folder, "train", samples=source, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_layout(tmp_path):
    part = write(tmp_path, Source())
    assert part["count"] == 5 and [s["count"] for s in part["shards"].values()] == [2, 2, 1]
    with tarfile.open(tmp_path / "train-00002.tar") as tar:
        assert sorted(tar.getnames()) == ["k4.json", "k4.mask.png", "k4.png"]
        assert tar.extractfile("k4.png").read() == b"picture 4"
        assert json.loads(tar.extractfile("k4.json").read()) == FIELDS | {"row": 4}
    manifest = json.loads((tmp_path / "manifest.json").read_text())["train"]
    assert manifest == part and manifest["seed"] == 1 and manifest["config"] == {"size": [8, 8]}
    assert manifest["shards"]["train-00002.tar"]["sha256"] == shards.sha256(tmp_path / "train-00002.tar")


def test_same_bytes_again_and_nothing_left_beside(tmp_path):
    write(tmp_path / "a", Source())
    write(tmp_path / "b", Source())
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert sorted(files(tmp_path / "a")) == ["manifest.json", *(f"train-0000{i}.tar" for i in range(3))]


def test_killed_and_resumed_is_the_same_as_never_killed(tmp_path):
    write(tmp_path / "whole", Source())
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "killed", Source(fails_at=3))
    assert not (tmp_path / "killed" / "train-00001.tar").exists()
    source = Source()
    write(tmp_path / "killed", source)
    assert source.asked == [2, 3, 4]
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_full_disk_names_the_shard_and_finished_ones_are_kept(tmp_path, monkeypatch):
    def full_later(path):
        beside = place_beside(path)
        if path.name == "train-00001.tar":
            beside.symlink_to("/dev/full")
        return beside

    with monkeypatch.context() as patch:
        patch.setattr(shards, "place_beside", full_later)
        with pytest.raises(OSError, match=r"the disk is full.*train-00001.tar"):
            write(tmp_path, Source())
    assert sorted(files(tmp_path)) == ["manifest.json", "train-00000.tar"]
    assert write(tmp_path, source := Source())["count"] == 5 and source.asked == [2, 3, 4]


def test_a_worker_that_outlives_its_run_does_not_spoil_the_next_runs_shard(tmp_path, monkeypatch):
    path, entries = tmp_path / "train-00000.tar", []

    def killed_before(rows):
        yield from Source()(rows)
        with monkeypatch.context() as patch:  # now the next run writes that shard, while this process is in the middle of it
            patch.setattr(os, "getpid", lambda: 7)
            entries.append(write_shard(path, Source()(range(2))))
        yield from Source()(range(100, 200))

    with pytest.raises(FileNotFoundError):
        write_shard(path, killed_before(range(100)))
    assert entries == [{"count": 2, "sha256": shards.sha256(path)}] and list(files(tmp_path)) == [path.name]


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.fstat(number).st_ino) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda source, target: done.append("renamed") or replace(source, target))
    write_shard(tmp_path / "train-00000.tar", Source()(range(2)))
    assert done == [(tmp_path / "train-00000.tar").stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_finished_shards_are_kept_damaged_ones_written_again(tmp_path):
    write(tmp_path, Source())
    before, source = files(tmp_path), Source()
    (tmp_path / "train-00001.tar").write_bytes(before["train-00001.tar"][:700])
    (tmp_path / "train-00002.tar").unlink()
    write(tmp_path, source)
    assert source.asked == [2, 3, 4] and files(tmp_path) == before
    write(tmp_path, again := Source())
    assert not again.asked


def test_another_configuration_is_refused_or_replaced(tmp_path):
    write(tmp_path, Source())
    before = files(tmp_path)
    with pytest.raises(ValueError, match="shards of another seed or configuration: remove them or write elsewhere"):
        write(tmp_path, Source(), seed=2)
    assert files(tmp_path) == before
    part = write(tmp_path, Source(), seed=2, count=2, overwrite=True)
    assert part["count"] == 2 and sorted(files(tmp_path)) == ["manifest.json", "train-00000.tar"]


def test_a_kill_while_old_shards_are_removed_leaves_none_for_good(tmp_path, monkeypatch):
    write(tmp_path, Source())

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, Source(), seed=2, count=2, overwrite=True)
    write(tmp_path, Source(), seed=2, count=2, overwrite=True)
    assert sorted(files(tmp_path)) == ["manifest.json", "train-00000.tar"]


def test_shards_of_unknown_origin_are_not_touched(tmp_path):
    (tmp_path / "train-00007.tar").write_bytes(b"someone's")
    with pytest.raises(ValueError, match="remove them or write elsewhere"):
        write(tmp_path, Source())
    assert files(tmp_path) == {"train-00007.tar": b"someone's"}


def test_splits_share_a_manifest(tmp_path):
    write(tmp_path, Source())
    write_shards(tmp_path, "val", 2, Source(), samples_per_shard=2, seed=0, config={})
    assert {split: part["count"] for split, part in shards.read_manifest(tmp_path).items()} == {"train": 5, "val": 2}


@pytest.mark.parametrize("change, message", [
    ({"key": "a.b"}, "without dots and slashes"), ({"key": "a/b"}, "without dots"), ({"extension": "gif"}, "neither jpg nor png"),
    ({"fields": {"caption": "x"}}, r"'k' lacks the fields \['caption_full', 'label'")])
def test_samples_that_cannot_be_read_back_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ShardSample(**{"key": "k", "picture": b"", "extension": "png", "mask": b"", "fields": FIELDS} | change)


def test_patterns(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "b-0.tar"):
        (tmp_path / name).touch()
    both = [str(tmp_path / "a-0.tar"), str(tmp_path / "a-1.tar")]
    assert expand_shards(str(tmp_path / "a-*.tar")) == both
    assert expand_shards(str(tmp_path / "a-{0..1}.tar")) == both
    assert expand_shards([both[1], both[0], str(tmp_path / "a-*.tar")]) == both
    assert expand_shards("https://host/x-{0..1}.tar") == ["https://host/x-0.tar", "https://host/x-1.tar"]
    assert expand_shards([both[0], f"{tmp_path}/./a-0.tar", os.path.relpath(both[0])]) == [os.path.relpath(both[0])]
    (tmp_path / "a[1].tar").touch()
    assert expand_shards(str(tmp_path / "a[1].tar")) == [str(tmp_path / "a[1].tar")], "the file of that name, and no pattern"
    with pytest.raises(ValueError, match=r"no shard matches '.*c-\*.tar'"):
        expand_shards(str(tmp_path / "c-*.tar"))


def test_too_few_shards_name_the_numbers_and_the_way_out():
    require_a_shard_each(4, 2, 2)
    require_a_shard_each(2, 2, 0)
    with pytest.raises(ValueError, match="5 training shards are too few for 2 ranks x 3 workers = 6 readers: "
                                         "set num_workers to at most 2, use fewer ranks, or write at least 6 smaller shards"):
        require_a_shard_each(5, 2, 3)


@pytest.mark.parametrize("caption, label, expected", [
    ("A Cat sits", "cat", True), ("a toy robot, wet", "toy robot", True), ("a concat", "cat", False), ("cats", "cat", False),
    ("a c++ book", "c++", True)])
def test_labels_are_whole_words(caption, label, expected):
    assert contains_label(caption, label) is expected


def test_a_shard_is_what_webdatasets_writer_writes(tmp_path):
    long = "k" * 120  # beyond a plain tar's names
    samples = [ShardSample("a", b"picture", "png", b"mask", FIELDS), ShardSample(long, b"p" * 1000, "jpg", b"", FIELDS | {"author": "Zoë"})]
    write_shard(tmp_path / "a.tar", samples)
    expected = io.BytesIO()
    with wds.TarWriter(expected, encoder=False, mtime=0) as writer:
        for sample in samples:
            text = json.dumps(sample.fields, ensure_ascii=False, sort_keys=True).encode()
            writer.write({"__key__": sample.key, sample.extension: sample.picture, "mask.png": sample.mask, "json": text})
    assert (tmp_path / "a.tar").read_bytes() == expected.getvalue()
