"""Fetching: retries, resuming, checksums, ranges."""

import hashlib
import zipfile
from types import SimpleNamespace

import pytest

from datamodules.openimages.config import FetchConfig, SourcesConfig
from datamodules.openimages.fetch import ChecksumError, Fetcher, MissingError, RemoteFile, UnreachableError, server_md5
from datamodules.openimages.sources import Sources

CONTENT = bytes(range(256)) * 12_000  # 3 MB


@pytest.fixture
def bucket(tmp_path, serve):
    (tmp_path / "file").write_bytes(CONTENT)
    return serve(tmp_path)


@pytest.fixture
def fetcher():
    return Fetcher(FetchConfig(backoff=0.001, retries=3))


@pytest.mark.parametrize("faults", [[], [503], [429, 500], ["cut"], ["cut", 503, "garbled"]])
def test_a_file_comes_whole_in_spite_of_faults(bucket, fetcher, tmp_path, faults):
    bucket.faults["file"] = list(faults)
    assert fetcher.read(f"{bucket.url}/file") == CONTENT
    bucket.faults["file"] = list(faults)
    fetcher.download(f"{bucket.url}/file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT and not (tmp_path / "copy.part").exists()


def test_each_wait_is_twice_the_last_up_to_a_bound_or_as_long_as_the_server_asks(bucket, monkeypatch):
    """By a half shorter at random, so that many processes do not come back at once."""
    waits: list[float] = []
    monkeypatch.setattr("datamodules.openimages.fetch.time", SimpleNamespace(sleep=waits.append))
    fetcher = Fetcher(FetchConfig(backoff=1.0, max_backoff=10.0, retries=6))
    bucket.faults["file"] = [503] * 6
    assert fetcher.read(f"{bucket.url}/file") == CONTENT
    assert [longest / 2 <= wait <= longest for wait, longest in zip(waits, (1, 2, 4, 8, 10, 10), strict=True)] == [True] * 6
    for asked, waited in ((2, 2), (999, 10)):
        waits.clear()
        bucket.faults["file"], bucket.retry_after = [429], asked
        assert fetcher.read(f"{bucket.url}/file") == CONTENT and waits == [waited]


def test_a_cut_download_goes_on_where_it_was_cut(bucket, fetcher, tmp_path):
    bucket.faults["file"] = ["cut"]
    fetcher.download(f"{bucket.url}/file", tmp_path / "copy")
    start = int(bucket.requests[-1][1].removeprefix("bytes=").rstrip("-"))
    assert 0 < start <= len(CONTENT) // 2 and (tmp_path / "copy").read_bytes() == CONTENT


def test_a_download_that_is_cut_more_often_than_it_may_be_retried_goes_on_while_some_of_it_comes(bucket, fetcher, tmp_path):
    bucket.faults["file"] = ["cut"] * 9
    fetcher.download(f"{bucket.url}/file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT
    bucket.faults["file"] = [503] * 9
    with pytest.raises(UnreachableError, match="after 3 retries"):
        fetcher.download(f"{bucket.url}/file", tmp_path / "other")


def test_a_part_that_is_whole_already_is_taken(bucket, fetcher, tmp_path):
    (tmp_path / "copy.part").write_bytes(CONTENT)
    fetcher.download(f"{bucket.url}/file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_a_part_of_the_right_length_and_other_bytes_is_not_taken(bucket, fetcher, tmp_path):
    (tmp_path / "copy.part").write_bytes(bytes(len(CONTENT)))
    fetcher.download(f"{bucket.url}/file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_redirects_are_followed(bucket, fetcher):
    assert fetcher.read(f"{bucket.url}/moved/file") == CONTENT


def test_missing_and_unreachable_files_are_told_apart_and_named(bucket, fetcher):
    with pytest.raises(MissingError, match="/nothing: HTTP 403"):
        fetcher.read(f"{bucket.url}/nothing")
    assert [path for path, _ in bucket.requests] == ["nothing"]  # not asked again
    bucket.faults["file"] = [503] * 4
    with pytest.raises(UnreachableError, match="/file: HTTP 503 .after 3 retries"):
        fetcher.read(f"{bucket.url}/file")


def test_wrong_bytes_are_never_taken(bucket, fetcher):
    bucket.faults["file"] = ["garbled"] * 4
    with pytest.raises(ChecksumError, match="/file: MD5"):
        fetcher.read(f"{bucket.url}/file")


def test_ranges_read_only_what_is_looked_at(bucket, fetcher):
    bucket.faults["file"] = [503, "cut"]
    remote = RemoteFile(fetcher, f"{bucket.url}/file")
    with remote.open() as file:
        file.seek(-100, 2)
        assert file.read() == CONTENT[-100:]
        file.seek(7)
        assert file.read(5) == CONTENT[7:12]
    assert remote.read_at(len(CONTENT) - 3, 100) == CONTENT[-3:] and remote.read_at(len(CONTENT) + 3, 100) == b""


def test_md5_of_both_storage_services():
    md5 = hashlib.md5(b"x").hexdigest()
    assert server_md5({"ETag": f'"{md5}"'}) == md5
    assert server_md5({"x-goog-hash": "crc32c=AAAAAA==,md5=nd1MBha5p1F3vJtuVVxMTQ=="}) == "9ddd4c0616b9a75177bc9b6e555c4c4d"
    assert server_md5({"ETag": f'"{md5}-4"'}) is None  # of several parts: no MD5
    assert server_md5({"ETag": f'"{md5}"', "x-amz-server-side-encryption": "aws:kms"}) is None


def test_what_is_there_is_not_fetched_again(plain_bucket, serve, tmp_path):
    bucket = serve(plain_bucket)
    sources = Sources(SourcesConfig(f"{bucket.url}/annotations", f"{bucket.url}/pictures"), "train", tmp_path)
    image = next((plain_bucket / "pictures/train").iterdir()).stem
    for _ in range(2):
        sources.file("masks")
        sources.picture(image)
    assert len(bucket.requests) == 2


def test_files_of_two_bases_are_two_files(serve, tmp_path):
    """Else a run that names another server would go on with the first one's files."""
    found = []
    for name in ("a", "b"):
        root = tmp_path / name
        for path in ("annotations/x.csv", "annotations/0.zip", "pictures/train/0.jpg", "captions.csv"):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(f"{path} of {name}")
        with zipfile.ZipFile(root / "annotations/0.zip", "w") as archive:
            archive.writestr("0.png", f"mask of {name}")
        url = serve(root).url
        for whole in (False, True):
            config = SourcesConfig(f"{url}/annotations", f"{url}/pictures", masks="x.csv", mask_zip="{digit}.zip", captions=f"{url}/captions.csv",
                                   download_mask_zips=whole)
            sources = Sources(config, "train", tmp_path / "cache")
            found.append([sources.file("masks").read_text(), sources.mask("0.png").decode(), sources.picture("0").decode(),
                          sources.captions_file().read_text()])
    assert found == [[f"{what} of {name}" for what in ("annotations/x.csv", "mask", "pictures/train/0.jpg", "captions.csv")] for name in "aabb"]


def test_one_mask_does_not_fetch_its_whole_zip(plain_bucket, serve, tmp_path):
    bucket = serve(plain_bucket)
    sources = Sources(SourcesConfig(f"{bucket.url}/annotations", ""), "train", tmp_path)
    name = next(_mask_names(plain_bucket))
    assert sources.mask(name).startswith(b"\x89PNG")
    assert all(asked is not None for path, asked in bucket.requests if path.endswith(".zip"))
    with pytest.raises(MissingError, match="no.*" + name[0] + "nothing"):
        sources.mask(name[0] + "nothing.png")


def test_a_zip_that_is_not_there_or_is_none_is_no_reason_to_drop_its_masks(tmp_path):
    zips = tmp_path / "v5/train-masks"
    zips.mkdir(parents=True)
    (zips / "train-masks-0.zip").write_bytes(b"<html>moved</html>" * 10)
    sources = Sources(SourcesConfig(str(tmp_path), ""), "train", tmp_path / "cache")
    with pytest.raises(ValueError, match="train-masks-0.zip is not a whole zip .*run again"):
        sources.mask("0123_m_1.png")
    with pytest.raises(FileNotFoundError, match="train-masks-1.zip is missing: sources.mask_zip") as error:
        sources.mask("1123_m_1.png")
    assert not isinstance(error.value, MissingError)


def test_a_zip_that_the_server_does_not_have_is_told_apart_from_a_mask_that_it_lacks(plain_bucket, serve, tmp_path):
    sources = Sources(SourcesConfig(f"{serve(plain_bucket).url}/annotations", "", mask_zip="v5/nothing-{digit}.zip"), "train", tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing-0.zip: HTTP 404 .sources.mask_zip") as error:
        sources.mask("0123_m_1.png")
    assert not isinstance(error.value, MissingError)


def _mask_names(root):
    for path in sorted(root.glob("annotations/v5/train-masks/*.zip")):
        yield from zipfile.ZipFile(path).namelist()


def test_metadata_md5_decides_where_lengths_agree(plain_bucket, tmp_path):
    image = next((plain_bucket / "pictures/train").iterdir())
    size = image.stat().st_size
    sources = Sources(SourcesConfig(pictures=str(plain_bucket / "pictures")), "train", tmp_path)
    assert sources.picture(image.stem, size + 1, "AAAAAAAAAAAAAAAAAAAAAA==")  # a scaled copy: another file than the MD5's
    with pytest.raises(ChecksumError, match=image.stem):
        sources.picture(image.stem, size, "AAAAAAAAAAAAAAAAAAAAAA==")
    sources.config.checksum = "original"
    with pytest.raises(ChecksumError, match=image.stem):
        sources.picture(image.stem, size + 1, "AAAAAAAAAAAAAAAAAAAAAA==")
