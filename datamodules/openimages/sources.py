"""OpenImages' files, wherever they are: annotation files, mask zips read by member, pictures from a bucket, a folder or tars."""

import base64
import hashlib
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from datamodules.openimages.archives import LocalFile, MaskZip, TarPictures
from datamodules.openimages.config import SourcesConfig, Split
from datamodules.openimages.fetch import ChecksumError, Fetcher, MissingError, RemoteFile, UnreachableError, is_url
from moma_lightning.files import write_bytes

DIGITS = "0123456789abcdef"


class Sources:
    """`config`'s files of a split; what is fetched is kept under `cache` and never fetched again."""

    def __init__(self, config: SourcesConfig, split: Split, cache: Path):
        self.config, self.split, self.cache = config, split, cache
        self.fetcher = Fetcher(config.fetch, verify=config.checksum != "off")
        self._zips: dict[str, MaskZip] = {}

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
        path = self._kept(self.config.annotations, name)
        if not path.is_file():
            self.fetcher.download(f"{self.config.annotations}/{name}", path)
        return path

    def captions_file(self) -> Path | None:
        """A captions file of the user's, or None. Raises FileNotFoundError."""
        if self.config.captions is None:
            return None
        if is_url(self.config.captions):
            path = self._kept(self.config.captions, PurePosixPath(urlsplit(self.config.captions).path).name)
            if not path.is_file():
                self.fetcher.download(self.config.captions, path)
            return path
        if not Path(self.config.captions).is_file():
            raise FileNotFoundError(f"{self.config.captions} is missing: sources.captions")
        return Path(self.config.captions)

    def prepare(self) -> None:
        """What is done once, before many processes read: mask zips that are to be whole, the zips' indices and the tars'.

        Raises ValueError that names a zip or a tar that is none. A zip that is not there is missed when a mask of it is wanted.
        """
        if self._are_tars():
            self.tars.index()
        for digit in DIGITS:
            try:
                self._zip(digit)
            except FileNotFoundError:
                continue
            except UnreachableError:
                if self.config.fetch.on_unreachable == "raise" or self.config.download_mask_zips:
                    raise

    def mask(self, name: str) -> bytes:
        """A mask's PNG by its MaskPath.

        Raises MissingError when its zip has no such member, zipfile.BadZipFile for a broken one, and as `_zip`.
        """
        return self._zip(name[0].lower()).read(name)

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

    @cached_property
    def tars(self) -> TarPictures:
        return TarPictures(self.config.pictures, self.cache / "tar-index")

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
        path = self._picture_path(image_id)
        if path.is_file():
            return path.read_bytes()
        content = self.fetcher.read(f"{self.config.pictures}/{self.split}/{image_id}.jpg")
        write_bytes(path, content)
        return content

    def forget(self, image_id: str) -> None:
        self._picture_path(image_id).unlink(missing_ok=True)

    def _picture_path(self, image_id: str) -> Path:
        return self._kept(self.config.pictures, f"pictures/{image_id[:2]}/{image_id}.jpg")

    def _zip(self, digit: str) -> MaskZip:
        """Raises FileNotFoundError, ValueError or UnreachableError for a whole zip that is not there, is none or is not served."""
        if digit not in self._zips:
            try:
                self._zips[digit] = MaskZip(self._zip_file(digit), self.cache / "zip-index")
            except MissingError as error:
                raise FileNotFoundError(f"{error} (sources.mask_zip)") from error
        return self._zips[digit]

    def _zip_file(self, digit: str) -> LocalFile | RemoteFile:
        if is_url(self.config.annotations) and not self.config.download_mask_zips:
            return RemoteFile(self.fetcher, f"{self.config.annotations}/{self.name('mask_zip').format(digit=digit)}")
        return LocalFile(self.file("mask_zip", digit=digit))

    def _kept(self, base: str, name: str) -> Path:
        """Where a file that was fetched from `base` is kept: one of the same name from elsewhere is another."""
        return self.cache / hashlib.sha256(base.encode()).hexdigest()[:8] / name
