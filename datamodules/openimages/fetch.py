"""Files over HTTPS: retried with back-off, resumed where they were cut, checked against the server's own MD5."""

import base64
import hashlib
import random
import re
import time
from collections.abc import Callable
from io import BufferedReader, RawIOBase
from pathlib import Path
from threading import local
from typing import Any, TypeVar

import requests

from datamodules.openimages.config import FetchConfig
from moma_lightning.files import commit

T = TypeVar("T")
CHUNK = 1 << 16  # what a cut connection loses at most
AGAIN = "; what is there is kept, so run again"
RETRIED = (408, 425, 429, 500, 502, 503, 504)
BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError)


class MissingError(FileNotFoundError):
    """The server says that there is no such file (404, 410), or that it is not public (403: a bucket's answer for both)."""


class UnreachableError(ConnectionError):
    """A server still failed after all retries."""


class ChecksumError(OSError):
    """A file came whole, but not as its checksum says."""


class _TransientError(Exception):
    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


def is_url(path: str) -> bool:
    return path.startswith(("http://", "https://"))


class Fetcher:
    """One per process; each of its threads has its own connections."""

    def __init__(self, config: FetchConfig, verify: bool = True):
        self.config, self.verify, self._local = config, verify, local()

    def read(self, url: str) -> bytes:
        """A small file. Raises MissingError, UnreachableError or ChecksumError, which name the URL."""
        def once() -> bytes:
            with self._get(url) as answer:
                content = answer.content
                _check_length(len(content), answer)
                self._check(hashlib.md5(content, usedforsecurity=False), answer, url)
                return content
        return self._retry(url, once)

    def download(self, url: str, path: Path) -> None:
        """A large file to `path`, by way of `<path>.part`, which a later call goes on with; retries count anew where some of it came."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        while True:
            before = _size(part)
            try:
                self._retry(url, lambda: self._continue(url, part))
                break
            except UnreachableError:
                if _size(part) <= before:
                    raise
        commit(part, path)

    def read_range(self, url: str, start: int, length: int) -> bytes:
        def once() -> bytes:
            with self._get(url, {"Range": f"bytes={start}-{start + length - 1}"}) as answer:
                if answer.status_code != 206:
                    raise UnreachableError(f"{url}: the server does not serve ranges: set sources.download_mask_zips")
                _check_length(len(answer.content), answer)
                return answer.content
        return self._retry(url, once)

    def size(self, url: str) -> int:
        def once() -> int:
            with self._get(url, {"Range": "bytes=0-0"}) as answer:
                total = answer.headers.get("Content-Range", "").rpartition("/")[2]
                if not total.isdigit():
                    raise UnreachableError(f"{url}: the server does not serve ranges: set sources.download_mask_zips")
                return int(total)
        return self._retry(url, once)

    def _continue(self, url: str, part: Path) -> None:
        have = _size(part)
        with self._get(url, {"Range": f"bytes={have}-"} if have else {}, allow=(416,)) as answer:
            if answer.status_code == 416:  # nothing left: whole already, or of another version
                total = answer.headers.get("Content-Range", "").rpartition("/")[2]
                if total != str(have):
                    part.unlink()
                    raise _TransientError("the half file was longer than the whole one")
                with self._get(url, {"Range": "bytes=0-0"}) as first:  # for its checksum
                    self._verify(part, first, url)
                return
            with part.open("ab" if answer.status_code == 206 else "wb") as file:
                for chunk in answer.iter_content(CHUNK):
                    file.write(chunk)
            _check_total(part, answer)
            self._verify(part, answer, url)

    def _verify(self, part: Path, answer: requests.Response, url: str) -> None:
        """Raises ChecksumError, the part removed, where the server's MD5 is another."""
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        try:
            self._check(digest, answer, url)
        except ChecksumError:
            part.unlink()
            raise

    def _get(self, url: str, headers: dict[str, str] | None = None, allow: tuple[int, ...] = ()) -> requests.Response:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        plain = {"Accept-Encoding": "identity"}  # lengths and checksums are of the file, not of a compressed copy
        answer = self._local.session.get(url, headers=plain | (headers or {}), timeout=self.config.timeout, stream=True)
        if answer.ok or answer.status_code in allow:
            return answer
        answer.close()
        if answer.status_code in (403, 404, 410):
            raise MissingError(f"{url}: HTTP {answer.status_code}")
        if answer.status_code in RETRIED:
            wait = answer.headers.get("Retry-After", "")
            raise _TransientError(f"HTTP {answer.status_code}", float(wait) if wait.isdigit() else None)
        raise UnreachableError(f"{url}: HTTP {answer.status_code}")

    def _check(self, digest: Any, answer: requests.Response, url: str) -> None:
        expected = server_md5(answer.headers) if self.verify else None
        if expected is not None and digest.hexdigest() != expected:
            raise ChecksumError(f"{url}: MD5 {digest.hexdigest()} is not the server's {expected}")

    def _retry(self, url: str, once: Callable[[], T]) -> T:
        for attempt in range(self.config.retries + 1):
            try:
                return once()
            except (*BROKEN, _TransientError, ChecksumError) as error:
                last = error
            if attempt < self.config.retries:
                wait = min(self.config.backoff * 2**attempt, self.config.max_backoff) * random.uniform(0.5, 1)
                time.sleep(max(wait, min(getattr(last, "wait", None) or 0, self.config.max_backoff)))
        if isinstance(last, ChecksumError):
            raise last
        raise UnreachableError(f"{url}: {last} (after {self.config.retries} retries){AGAIN}")


class RemoteFile:
    """A file of a server that is read where it is looked at; `size` is asked for at once. Errors as of `read_range`."""

    readings = 2  # of what has a checksum of its own: a range comes without one

    def __init__(self, fetcher: Fetcher, url: str):
        self.fetcher, self.name, self.size, self.version = fetcher, url, fetcher.size(url), ""

    def open(self) -> BufferedReader:
        return BufferedReader(_Ranges(self), buffer_size=1 << 18)

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes: fewer, or none, at the file's end and beyond."""
        length = min(length, self.size - offset)
        return self.fetcher.read_range(self.name, offset, length) if length > 0 else b""


class _Ranges(RawIOBase):
    """A remote file for whoever reads a zip's directory, which has no checksum: each range is read until it is the same twice."""

    def __init__(self, file: RemoteFile):
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + {0: 0, 1: self.position, 2: self.file.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        seen: set[bytes] = set()
        for _ in range(self.file.fetcher.config.retries + 2):
            content = self.file.read_at(self.position, len(buffer))
            if content in seen or not content:
                buffer[: len(content)] = content
                self.position += len(content)
                return len(content)
            seen.add(content)
        raise UnreachableError(f"{self.file.name}: the bytes from {self.position} are others at each reading{AGAIN}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_length(length: int, answer: requests.Response) -> None:
    expected = answer.headers.get("Content-Length")
    if expected is not None and int(expected) != length:
        raise _TransientError(f"cut after {length} of {expected} bytes")


def _check_total(part: Path, answer: requests.Response) -> None:
    total = answer.headers.get("Content-Range", "").rpartition("/")[2] or answer.headers.get("Content-Length", "")
    if total.isdigit() and part.stat().st_size != int(total):
        raise _TransientError(f"cut after {part.stat().st_size} of {total} bytes")


def server_md5(headers: Any) -> str | None:
    """The MD5 that a storage server tells of a file: Google's x-goog-hash, or Amazon's ETag of files uploaded in one part."""
    google = re.search(r"md5=([A-Za-z0-9+/]{22}==)", headers.get("x-goog-hash", ""))
    if google:
        return base64.b64decode(google.group(1)).hex()
    amazon = re.fullmatch(r'"([0-9a-f]{32})"', headers.get("ETag", ""))
    encrypted = headers.get("x-amz-server-side-encryption", "AES256") != "AES256"  # such an ETag is no MD5
    return amazon.group(1) if amazon and not encrypted else None
