"""OpenImages' files, wherever they are: annotation files, mask zips read by member, pictures from a bucket, a folder or tars."""

import base64
import glob
import hashlib
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from datamodules.openimages.config import SourcesConfig, Split
from datamodules.openimages.fetch import ChecksumError, Fetcher, MissingError, UnreachableError, is_url
from moma_lightning.files import write_beside, write_bytes

DIGITS = "0123456789abcdef"
MAX_MASK_BYTES = 32 << 20  # of one unpacked mask: a zip bomb is refused, not unpacked


class Sources:
    """`config`'s files of a split; what is fetched is kept under `cache` and never fetched again."""

    def __init__(self, config: SourcesConfig, split: Split, cache: Path):
        self.config, self.split, self.cache = config, split, cache
        self.fetcher = Fetcher(config.fetch, verify=config.checksum != "off")
        self._zips: dict[str, zipfile.ZipFile] = {}
        self._tars: TarPictures | None = None

    def name(self, kind: str) -> str:
        """Path of an annotation file below the annotations' base, by its name in SourcesConfig."""
        train = self.split == "train"
        names = {"boxes": "v6/oidv6-train-annotations-bbox.csv" if train else "v5/{split}-annotations-bbox.csv",
                 "metadata": f"2018_04/{{split}}/{{split}}-images-{'boxable-' if train else ''}with-rotation.csv"}
        return (getattr(self.config, kind) or names[kind]).format(split=self.split, digit="{digit}")

    def file(self, kind: str, **fields: str) -> Path:
        """A local path of an annotation file, downloaded where its base is a URL. Raises FileNotFoundError."""
        name = self.name(kind).format(**fields)
        if not is_url(self.config.annotations):
            path = Path(self.config.annotations) / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: sources.{kind} of {self.split}, below sources.annotations")
            return path
        path = self.cache / name
        if not path.is_file():
            self.fetcher.download(f"{self.config.annotations}/{name}", path)
        return path

    def captions_file(self) -> Path | None:
        """A captions file of the user's, or None. Raises FileNotFoundError."""
        if self.config.captions is None:
            return None
        if is_url(self.config.captions):
            path = self.cache / "captions" / self.config.captions.rpartition("/")[2]
            if not path.is_file():
                self.fetcher.download(self.config.captions, path)
            return path
        if not Path(self.config.captions).is_file():
            raise FileNotFoundError(f"{self.config.captions} is missing: sources.captions")
        return Path(self.config.captions)

    def prepare(self) -> None:
        """What is done once, before many processes read: mask zips that are to be whole, and the tars' indices."""
        if is_url(self.config.annotations) and self.config.download_mask_zips:
            for digit in DIGITS:
                self.file("mask_zip", digit=digit)
        if self._are_tars():
            self.tars.index()

    def mask(self, name: str) -> bytes:
        """A mask's PNG by its MaskPath.

        Raises MissingError when its zip has no such member, zipfile.BadZipFile for a broken one, and as `_zip`.
        """
        archive = self._zip(name[0].lower())
        try:
            member = archive.getinfo(name)
        except KeyError as error:
            raise MissingError(f"{archive.filename} has no {name}") from error
        if member.file_size > MAX_MASK_BYTES:
            raise zipfile.BadZipFile(f"{name} unpacks to {member.file_size} bytes")
        return archive.read(member)

    def picture(self, image_id: str, size: float | None = None, md5: str | None = None) -> bytes:
        """A picture's bytes. size and md5 (base64) are the metadata's OriginalSize and OriginalMD5.

        Raises MissingError, UnreachableError, or ChecksumError.
        """
        content = self._picture(image_id)
        if self.config.checksum == "off" or not md5:
            return content
        if len(content) == size or self.config.checksum == "original":
            found = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
            if found != md5:
                raise ChecksumError(f"{image_id}: MD5 {found} is not the metadata's {md5}")
        return content

    @property
    def tars(self) -> "TarPictures":
        if self._tars is None:
            self._tars = TarPictures(self.config.pictures, self.cache / "tar-index")
        return self._tars

    def _are_tars(self) -> bool:
        return not is_url(self.config.pictures) and not Path(self.config.pictures).is_dir()

    def _picture(self, image_id: str) -> bytes:
        if is_url(self.config.pictures):
            return self._kept_picture(image_id)
        if self._are_tars():
            return self.tars.read(image_id)
        for folder in (self.split, "."):
            path = Path(self.config.pictures) / folder / f"{image_id}.jpg"
            if path.is_file():
                return path.read_bytes()
        raise MissingError(f"{self.config.pictures} has no {self.split}/{image_id}.jpg and no {image_id}.jpg")

    def _kept_picture(self, image_id: str) -> bytes:
        """A fetched picture stays beside the unit that it is for until that unit is finished: see `forget`."""
        path = self.cache / "pictures" / image_id[:2] / f"{image_id}.jpg"
        if path.is_file():
            return path.read_bytes()
        content = self.fetcher.read(f"{self.config.pictures}/{self.split}/{image_id}.jpg")
        write_bytes(path, content)
        return content

    def forget(self, image_id: str) -> None:
        (self.cache / "pictures" / image_id[:2] / f"{image_id}.jpg").unlink(missing_ok=True)

    def _zip(self, digit: str) -> zipfile.ZipFile:
        """Raises FileNotFoundError, ValueError or UnreachableError for a whole zip that is not there, is none or is not served."""
        if digit not in self._zips:
            try:
                self._zips[digit] = zipfile.ZipFile(self._zip_file(digit))  # type: ignore[arg-type]
            except MissingError as error:
                raise FileNotFoundError(f"{error} (sources.mask_zip)") from error
            except zipfile.BadZipFile as error:
                if isinstance(error.__context__, UnreachableError):  # any OSError, while a zip's end is looked for, says to zipfile that it is none
                    raise error.__context__ from None
                name = self.name("mask_zip").format(digit=digit)
                raise ValueError(f"{name} is not a whole zip ({error}): remove it and run again") from error
        return self._zips[digit]

    def _zip_file(self, digit: str) -> Any:
        if is_url(self.config.annotations) and not self.config.download_mask_zips:
            return self.fetcher.open(f"{self.config.annotations}/{self.name('mask_zip').format(digit=digit)}")
        return self.file("mask_zip", digit=digit)


class TarPictures:
    """Pictures of tars by ImageID, read in place. Members are known by their name's last part only: nothing is ever unpacked."""

    def __init__(self, pattern: str, cache: Path):
        self.paths = [Path(path) for path in sorted(glob.glob(pattern))]
        if not self.paths:
            raise FileNotFoundError(f"{pattern}: no such folder, and no tar matches it (sources.pictures)")
        self.cache = cache
        self._index: tuple[np.ndarray, np.ndarray] | None = None

    def index(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted ImageIDs as numbers, and (tar, offset, size) of each; kept on disk, as reading 500 GB of headers takes long."""
        if self._index is None:
            parts = [self._one(number, path) for number, path in enumerate(self.paths)]
            ids, places = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
            order = np.argsort(ids, kind="stable")
            self._index = ids[order], places[order]
        return self._index

    def read(self, image_id: str) -> bytes:
        ids, places = self.index()
        number = np.uint64(int(image_id, 16))
        row = int(np.searchsorted(ids, number))
        if row == len(ids) or ids[row] != number:
            raise MissingError(f"{image_id}: in none of {len(self.paths)} tars ({self.paths[0]}, ...)")
        tar, offset, size = places[row].tolist()
        with self.paths[tar].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _one(self, number: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
        state = path.stat()
        kept = self.cache / f"{path.name}-{state.st_size}-{state.st_mtime_ns}.npz"
        if not kept.exists():
            found = _members(path)
            ids, places = np.array([f[0] for f in found], np.uint64), np.array([f[1:] for f in found], np.int64).reshape(-1, 2)
            write_beside(kept, lambda beside: np.savez(beside, ids=ids, places=places))
        with np.load(kept) as stored:
            places = np.concatenate([np.full((len(stored["ids"]), 1), number, np.int64), stored["places"]], 1)
            return stored["ids"], places


def _members(path: Path) -> list[tuple[int, int, int]]:
    try:
        with tarfile.open(path, "r:") as tar:
            return [(int(PurePosixPath(m.name).stem, 16), m.offset_data, m.size) for m in tar if m.isfile() and _is_picture(m.name)]
    except tarfile.ReadError as error:
        raise ValueError(f"{path} cannot be read as a tar ({error}); a compressed one must be unpacked to .tar first") from error


def _is_picture(name: str) -> bool:
    stem = PurePosixPath(name).stem
    return name.endswith(".jpg") and len(stem) == 16 and all(c in DIGITS for c in stem)
