"""Members of zips and tars, read in place by their index: the right bytes, or the file named that is damaged."""

import io
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from datamodules.openimages import archives
from datamodules.openimages.archives import LocalFile, MaskZip, TarPictures
from datamodules.openimages.config import FetchConfig, SourcesConfig
from datamodules.openimages.fetch import Fetcher, MissingError, RemoteFile, UnreachableError
from datamodules.openimages.sources import Sources

NAMES = [f"{i:016x}_m01yrx_{i * 77:08x}.png" for i in range(12)]
LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"


def content_of(name: str) -> bytes:
    return name.encode() * 9


def write_zip(path: Path, names=NAMES) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, content_of(name), zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED)
    return path


def change(path: Path, mark: bytes, name: str, changes: dict[int, bytes]) -> None:
    """New bytes at these offsets of the header (of the directory, or before the member) that has this name."""
    data = bytearray(path.read_bytes())
    start = data.index(mark)
    while name.encode() not in data[start : start + 46 + len(name)]:
        start = data.index(mark, start + 1)
    for offset, new in changes.items():
        data[start + offset : start + offset + len(new)] = new
    path.write_bytes(data)


@pytest.fixture
def zipped(tmp_path) -> Path:
    return write_zip(tmp_path / "masks-0.zip")


@pytest.fixture
def opened(tmp_path):
    return lambda path: MaskZip(LocalFile(path), tmp_path / "index")


def test_every_member_is_read_as_zipfile_reads_it(zipped, opened):
    masks = opened(zipped)
    assert all(masks.read(name) == content_of(name) for name in NAMES)
    with pytest.raises(MissingError, match="masks-0.zip has no 0_nothing.png"):
        masks.read("0_nothing.png")


def test_a_zip_without_members_has_none(tmp_path, opened):
    with pytest.raises(MissingError):
        opened(write_zip(tmp_path / "empty.zip", [])).read(NAMES[0])


def test_the_directory_is_read_once_by_all_who_read_members_and_again_when_the_zip_is_another(zipped, opened, monkeypatch):
    opened(zipped)
    with monkeypatch.context() as context:
        context.setattr(zipfile, "ZipFile", None)
        masks = opened(zipped)
        assert isinstance(masks.members, np.memmap) and masks.read(NAMES[3]) == content_of(NAMES[3])
    other = write_zip(zipped, NAMES[::-1])
    assert all(opened(other).read(name) == content_of(name) for name in NAMES)


def test_names_that_share_a_hash_are_told_apart(zipped, opened, monkeypatch):
    monkeypatch.setattr(archives, "hashed", lambda name: 7)
    masks = opened(zipped)
    assert all(masks.read(name) == content_of(name) for name in NAMES)
    with pytest.raises(zipfile.BadZipFile, match="0_nothing.png is not where"):
        masks.read("0_nothing.png")


def test_of_members_of_one_name_the_last_counts(tmp_path, opened):
    path = tmp_path / "twice.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for content in (b"first", b"second"):
            archive.writestr(NAMES[0], content)
    assert opened(path).read(NAMES[0]) == zipfile.ZipFile(path).read(NAMES[0]) == b"second"


def test_large_zips_long_extra_fields_and_a_head_before_the_zip(tmp_path, opened):
    path = tmp_path / "large.zip"
    with path.open("wb") as file:
        file.seek(5 << 30)  # a hole: offsets need more than 32 bits
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open(NAMES[0], "w", force_zip64=True) as member:
                member.write(content_of(NAMES[0]))
            info = zipfile.ZipInfo(NAMES[1])
            info.extra = struct.pack("<HH", 0x7777, 1000) + bytes(1000)
            archive.writestr(info, content_of(NAMES[1]))
    masks = opened(path)
    assert min(masks.members["offset"]) >= 5 << 30 and [masks.read(name) for name in NAMES[:2]] == [content_of(name) for name in NAMES[:2]]
    headed = tmp_path / "headed.zip"
    headed.write_bytes(b"#!/bin/sh\n" + write_zip(tmp_path / "plain.zip").read_bytes())
    assert opened(headed).read(NAMES[5]) == content_of(NAMES[5])


@pytest.mark.parametrize(("mark", "changes", "message"), [
    (CENTRAL, {6: b"\x63\0"}, "version 9.9"), (CENTRAL, {9: b"\x08", 46: b"\xff"}, "utf-8"), (CENTRAL, {0: b"XX"}, "magic number"),
    (CENTRAL, {28: b"\xff\xff"}, "3 members and not 12"), (END, {16: b"\x09"}, "no member is where"), (END, {0: b"XX"}, "not a zip file"),
])
def test_a_damaged_directory_is_the_zips_fault_not_each_masks(zipped, opened, mark, changes, message):
    change(zipped, mark, NAMES[2] if mark == CENTRAL else "", changes)
    with pytest.raises(ValueError, match=f"masks-0.zip is not a whole zip .*{message}.*run again"):
        opened(zipped)
    assert not list(zipped.parent.glob("index/*"))


@pytest.mark.parametrize(("mark", "offset", "new"), [
    (CENTRAL, 10, b"\x0c"), (CENTRAL, 10, b"\x0e"), (CENTRAL, 8, b"\x01"), (CENTRAL, 16, b"\0\0\0\0"), (CENTRAL, 24, b"\xff\xff\xff\x7f"),
    (CENTRAL, 20, b"\xff\xff\xff\x7f"), (CENTRAL, 42, b"\xff\xff\xff\x7f"), (LOCAL, 0, b"XX"), (LOCAL, 30, b"f"), (LOCAL, 26, b"\1"),
    (LOCAL, 75, b"\xff\xff\xff"),
])
def test_a_damaged_member_is_named_and_the_others_stay(zipped, opened, mark, offset, new):
    change(zipped, mark, NAMES[5], {offset: new})
    masks = opened(zipped)
    with pytest.raises(zipfile.BadZipFile, match=NAMES[5]):
        masks.read(NAMES[5])
    assert all(masks.read(name) == content_of(name) for name in NAMES if name != NAMES[5])


def test_a_member_whose_path_leaves_the_zip_is_nobodys_mask(tmp_path, opened):
    masks = opened(write_zip(tmp_path / "away.zip", [f"../../{NAMES[0]}", f"/{NAMES[1]}", NAMES[2]]))
    assert masks.read(NAMES[2]) == content_of(NAMES[2])
    for name in NAMES[:2]:
        with pytest.raises(MissingError):
            masks.read(name)


class Unsteady(Fetcher):
    """Changes a byte of every `each`-th range."""

    each = 3

    def read_range(self, url: str, start: int, length: int) -> bytes:
        self.asked = getattr(self, "asked", 0) + 1
        content = bytearray(super().read_range(url, start, length))
        if self.asked % self.each == 0:
            content[int(np.random.default_rng(self.asked).integers(len(content)))] ^= 1
        return bytes(content)


def test_bytes_that_the_network_changes_change_no_mask(zipped, serve, tmp_path):
    bucket = serve(tmp_path)
    for start in range(3):
        fetcher = Unsteady(FetchConfig(backoff=0.001, retries=3))
        fetcher.asked = start
        masks = MaskZip(RemoteFile(fetcher, f"{bucket.url}/{zipped.name}"), tmp_path / f"cache{start}")
        assert all(masks.read(name) == content_of(name) for name in NAMES)
    fetcher.each = 1
    with pytest.raises(UnreachableError, match="others at each reading.*run again"):
        MaskZip(RemoteFile(fetcher, f"{bucket.url}/{zipped.name}"), tmp_path / "never")


def test_a_member_takes_one_request(zipped, serve, tmp_path):
    bucket = serve(tmp_path)
    masks = MaskZip(RemoteFile(Fetcher(FetchConfig()), f"{bucket.url}/{zipped.name}"), tmp_path / "index")
    bucket.requests.clear()
    masks.read(NAMES[4])
    assert len(bucket.requests) == 1


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_tars_are_read_in_place_and_compressed_ones_refused(tmp_path):
    ids = [f"{i * 2**60:016x}" for i in range(4)]
    tar_of(tmp_path / "train_0.tar", {f"train_0/{ids[i]}.jpg": ids[i].encode() for i in (2, 0)} | {"train_0/readme.jpg": b""})
    tar_of(tmp_path / "train_1.tar", {f"{ids[1]}.jpg": ids[1].encode(), f"{ids[2]}.jpg": b"again"})
    tars = TarPictures(str(tmp_path / "train_*.tar"), tmp_path / "index")
    assert [tars.read(i) for i in ids[:3]] == [i.encode() for i in ids[:3]]
    with pytest.raises(MissingError, match=ids[3]):
        tars.read(ids[3])
    assert isinstance(tars.index(), np.memmap)
    tar_of(tmp_path / "train_1.tar", {f"{ids[3]}.jpg": b"new"})
    assert TarPictures(str(tmp_path / "train_*.tar"), tmp_path / "index").read(ids[3]) == b"new"
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "train_0.tar")
    with pytest.raises(ValueError, match="b.tar.gz.*unpacked"):
        Sources(SourcesConfig(str(tmp_path), str(tmp_path / "b.tar.gz")), "train", tmp_path / "cache").prepare()


def test_a_member_whose_path_leaves_the_tar_is_nobodys_picture(tmp_path):
    ids = [f"{i:016x}" for i in range(3)]
    tar_of(tmp_path / "a.tar", {f"../../{ids[0]}.jpg": b"away", f"/{ids[1]}.jpg": b"away", f"a/{ids[2]}.jpg": b"here", f"a/../{ids[2]}.jpg": b"away"})
    sources = Sources(SourcesConfig(str(tmp_path), str(tmp_path / "a.tar")), "train", tmp_path / "cache")
    with pytest.warns(UserWarning, match=rf"a.tar: 3 pictures are left out, .*\.\./\.\./{ids[0]}.jpg"):
        sources.prepare()
    assert sources.picture(ids[2]) == b"here"
    for image_id in ids[:2]:
        with pytest.raises(MissingError, match=image_id):
            sources.picture(image_id)
