"""Masks of zips and pictures of tars, read in place by a compact index on disk, which all processes of a machine share."""

import glob
import hashlib
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from datamodules.openimages.fetch import MissingError, RemoteFile
from moma_lightning.files import write_beside

MAX_MASK_BYTES = 32 << 20  # of one unpacked mask: a zip bomb is refused, not unpacked

#: A member of a zip: what its directory says; `name` is the name's `hashed`.
MEMBER = np.dtype([("name", "<u8"), ("offset", "<u8"), ("packed", "<u8"), ("size", "<u8"), ("crc", "<u4"), ("method", "<u2"), ("flags", "<u2")])
#: A picture of a tar: `name` is the ImageID, `tar` the tar's place among its likes.
PICTURE = np.dtype([("name", "<u8"), ("offset", "<u8"), ("size", "<u8"), ("tar", "<u4")])

HEADER, SIGNATURE = struct.Struct("<4s22x2H"), b"PK\3\4"  # before a zip's member: signature, and how long its name and its extra field are
EXTRA = 256  # of an extra field that is read with its member; a longer one takes a second reading
ENCRYPTED = 0x41
#: What zipfile raises while it reads a directory that is damaged or none.
DAMAGED = (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError, EOFError)


class LocalFile:
    """A file on disk that is read where it is looked at."""

    readings = 1

    def __init__(self, path: Path):
        state = path.stat()
        self.path, self.name, self.size, self.version = path, str(path), state.st_size, str(state.st_mtime_ns)

    def open(self) -> BinaryIO:
        return self.path.open("rb")

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes: fewer, or none, at the file's end and beyond."""
        if offset >= self.size:
            return b""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


class MaskZip:
    """A zip's members by their whole name, as its directory has it.

    zipfile reads the directory, once, and its objects are not kept: the index is a tenth of their size, and mapped. Raises ValueError
    that names a zip whose directory is damaged.
    """

    def __init__(self, file: LocalFile | RemoteFile, cache: Path):
        self.file = file
        self.members = kept(cache / f"{key_of(file)}.npy", self._directory)

    def read(self, name: str) -> bytes:
        """Raises MissingError, zipfile.BadZipFile that names a damaged member, or UnreachableError."""
        key, names = np.uint64(hashed(name)), self.members["name"]
        rows = self.members[np.searchsorted(names, key) : np.searchsorted(names, key, "right")].tolist()
        if not rows:
            raise MissingError(f"{self.file.name} has no {name}")
        broken: list[zipfile.BadZipFile] = []
        for row in rows * self.file.readings:  # names may share a hash; what came over the network may have been damaged there
            try:
                return self._content(name, *row[1:])
            except zipfile.BadZipFile as error:
                broken.append(error)
        raise broken[-1]

    def _content(self, name: str, offset: int, packed: int, size: int, crc: int, method: int, flags: int) -> bytes:
        if flags & ENCRYPTED or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise zipfile.BadZipFile(f"{name} is encrypted or compressed by an unknown method: flags {flags}, method {method}")
        if max(size, packed) > MAX_MASK_BYTES:
            raise zipfile.BadZipFile(f"{name} unpacks from {packed} to {size} bytes")
        start = HEADER.size + len(name)
        read = self.file.read_at(offset, start + EXTRA + packed)
        signature, named, extra = HEADER.unpack(read[: HEADER.size].ljust(HEADER.size, b"\0"))
        if signature != SIGNATURE or named != len(name) or read[HEADER.size : start] != name.encode():
            raise zipfile.BadZipFile(f"{name} is not where the zip's directory says")
        data = read[start + extra :][:packed] if extra <= EXTRA else self.file.read_at(offset + start + extra, packed)
        try:
            content = data if method == zipfile.ZIP_STORED else zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error as error:
            raise zipfile.BadZipFile(f"{name}: {error}") from error
        if len(content) != size or zlib.crc32(content) != crc:
            raise zipfile.BadZipFile(f"{name}: its length or checksum is not the zip's")
        return content

    def _directory(self) -> np.ndarray:
        try:
            with self.file.open() as file, zipfile.ZipFile(file) as archive:
                infos = archive.NameToInfo.values()  # of members of one name the last: zipfile's choice, too
                rows = ((hashed(i.filename), i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type, i.flag_bits) for i in infos)
                members = _sorted(np.fromiter(rows, MEMBER))
                self._check(members, len(archive.filelist), zipfile._EndRecData(file)[zipfile._ECD_ENTRIES_TOTAL])  # type: ignore[attr-defined]
            return members
        except DAMAGED as error:
            if isinstance(error.__context__, OSError):  # of the disk or a server: while it looks for a zip's end, zipfile takes it for the end's absence
                raise error.__context__ from None
            raise ValueError(f"{self.file.name} is not a whole zip ({error}): remove it, or put a whole one there, and run again") from error

    def _check(self, members: np.ndarray, found: int, told: int) -> None:
        """What zipfile does not look for. Without zip64, a count above 65,535 begins anew."""
        if found % 2**16 != told % 2**16:
            raise zipfile.BadZipFile(f"its directory has {found} members and not {told}")
        if len(members) and not any(self.file.read_at(offset, 4) == SIGNATURE for offset in members["offset"][:3].tolist()):
            raise zipfile.BadZipFile("no member is where its directory says")  # all of it is shifted, or was made for another file


class TarPictures:
    """Pictures of tars by ImageID, their names' last part: nothing is ever unpacked. Raises FileNotFoundError where no tar matches."""

    def __init__(self, pattern: str, cache: Path):
        self.paths = [Path(path) for path in sorted(glob.glob(pattern))]
        if not self.paths:
            raise FileNotFoundError(f"{pattern}: no such folder, and no tar matches it (sources.pictures)")
        self.cache = cache
        self._index: np.ndarray | None = None

    def index(self) -> np.ndarray:
        """PICTUREs by ImageID; of each tar it is kept apart too, as reading 500 GB of headers takes long. Raises ValueError that names a bad tar."""
        if self._index is None:
            files = [LocalFile(path) for path in self.paths]
            self._index = kept(self.cache / f"{key_of(*files)}.npy", partial(self._merged, files))
        return self._index

    def read(self, image_id: str) -> bytes:
        """Raises MissingError."""
        index, number = self.index(), np.uint64(int(image_id, 16))
        row = int(np.searchsorted(index["name"], number))
        if row == len(index) or index["name"][row] != number:
            raise MissingError(f"{image_id}: in none of {len(self.paths)} tars ({self.paths[0]}, ...)")
        _, offset, size, tar = index[row].tolist()
        with self.paths[tar].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _merged(self, files: list[LocalFile]) -> np.ndarray:
        parts = [kept(self.cache / f"{key_of(file)}-one.npy", partial(_pictures, file.path)).copy() for file in files]
        for number, part in enumerate(parts):
            part["tar"] = number
        return _sorted(np.concatenate(parts))


def hashed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def key_of(*files: LocalFile | RemoteFile) -> str:
    """A short name for what these files hold: other files, and changed ones, have another."""
    states = [(file.name, file.size, file.version) for file in files]
    return f"{PurePosixPath(files[0].name).name}-{hashlib.sha256(repr(states).encode()).hexdigest()[:16]}"


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array at `path`, made where there is none yet; mapped, so that processes share its pages."""
    if not path.is_file():
        array = make()
        write_beside(path, lambda beside: np.save(beside, array))
    return np.load(path, mmap_mode="r")


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(rows["name"], kind="stable")]


def _pictures(path: Path) -> np.ndarray:
    """A tar's PICTUREs, but for those that would leave its folder: such a tar was not made by who made the pictures."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile() and _is_picture(member.name)]
    except tarfile.ReadError as error:
        raise ValueError(f"{path} cannot be read as a tar ({error}); a compressed one must be unpacked to .tar first") from error
    inside = [member for member in members if not _leaves(member.name)]
    if len(inside) < len(members):
        first = next(member.name for member in members if _leaves(member.name))
        warnings.warn(f"{path}: {len(members) - len(inside)} pictures are left out, whose paths leave the tar's folder ({first}, ...)", stacklevel=2)
    return _sorted(np.array([(int(PurePosixPath(m.name).stem, 16), m.offset_data, m.size, 0) for m in inside], PICTURE))


def _is_picture(name: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{16}\.jpg", PurePosixPath(name).name) is not None


def _leaves(name: str) -> bool:
    return name.startswith("/") or ".." in PurePosixPath(name).parts
