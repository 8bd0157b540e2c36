"""From shards to decoded triplets, and what becomes of the bad ones: named in a log and skipped, or fatal."""

import itertools
import json
import os
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import webdataset as wds
from jaxtyping import Float, UInt8
from torch import Tensor
from webdataset.tariterators import group_by_keys

from datamodules import pictures
from datamodules.shards import PICTURE_EXTENSIONS, contains_label
from datamodules.squares import cut, square_box

OnError = Literal["skip", "raise"]

#: The key of what is said of a shard and not of one of its samples.
WHOLE_SHARD = "-"
#: Names of files that describe the shard and belong to no sample; webdataset leaves them out too.
META = re.compile(r"__[^/]*__($|/)")


class BadSampleError(ValueError):
    """A sample or shard that cannot be used; the message says which one and why."""


@dataclass
class Triplet:
    """One decoded sample: picture in [-1, 1], mask 0 or 1; see `moma_lightning.batch.TripletBatch`."""

    pixel_values: Float[Tensor, "3 height width"]
    subject_mask: Float[Tensor, "1 height width"]
    caption: str
    label: str
    key: str
    full_caption: str


class BadSamples:
    """A log of what could not be used: a line `shard <tab> key <tab> reason` for each sample, however often it is met.

    With `on_error="raise"` the first one raises `BadSampleError` instead. Worker processes and ranks append to one file; what several of
    them meet may stand there more than once, and counts once.
    """

    def __init__(self, path: Path, on_error: OnError):
        self.path = path
        self.on_error = on_error
        self._known: set[str] | None = None

    def report(self, shard: str, key: str, reason: str) -> None:
        if self.on_error == "raise":
            raise BadSampleError(f"{shard}, sample {key}: {reason}")
        line = "\t".join(" ".join(part.split()) for part in (shard, key, reason))
        self._known = self.lines() if self._known is None else self._known
        if line in self._known:
            return
        if key == WHOLE_SHARD:
            warnings.warn(f"{shard}: {reason}. The rest of it is left out", stacklevel=2)
        elif all(known.split("\t")[1:2] == [WHOLE_SHARD] for known in self._known):
            warnings.warn(f"{shard}, sample {key}: {reason}. It is skipped; all such are named in {self.path}", stacklevel=2)
        self._known.add(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(line + "\n")

    def lines(self) -> set[str]:
        return set(self.path.read_text().splitlines()) if self.path.exists() else set()

    def counts(self) -> Counter[str]:
        """How many samples and shards were left out, by the reason's first words. Lines that two nodes have written into each other do not count."""
        fields = [line.split("\t") for line in self.lines()]
        return Counter(parts[2].split(":")[0] for parts in fields if len(parts) == 3)


def read_shards(shards: Iterable[str], bad: BadSamples) -> Iterator[dict[str, Any]]:
    """Undecoded webdataset samples of local shards or URLs, in order.

    A shard that cannot be opened, is cut short or damaged is reported under the key `WHOLE_SHARD`; what stands before
    the cut is used, but for the sample next to it.
    """
    for shard in shards:
        try:
            is_local = shard.endswith(".tar") and os.path.isfile(shard)
            yield from group_by_keys(_files(shard)) if is_local else wds.tarfile_samples([{"url": shard}])
        except (tarfile.TarError, EOFError) as error:
            bad.report(shard, WHOLE_SHARD, f"shard is cut short or damaged: {_message(error)}")
        except OSError as error:
            bad.report(shard, WHOLE_SHARD, f"shard cannot be read: {_message(error)}")
        except ValueError as error:
            bad.report(shard, WHOLE_SHARD, f"shard is malformed, its rest is left out: {_message(error)}")


def decode(sample: dict[str, Any], image_size: int, rng: np.random.Generator | None = None, flip: bool = False) -> Triplet:
    """Decode and check one sample, cut a square with the whole subject, flip picture and mask together half of the time.

    rng: places the square and decides the flip; None gives the central square, unflipped.
    Raises BadSampleError with the bare reason.
    """
    caption, label, full_caption = _texts(sample)
    picture, mask = _picture_and_mask(sample, image_size)
    box = square_box(picture.size, mask.getbbox(), rng)
    pixels, inside = cut(picture, box, image_size), cut(mask, box, image_size)
    if not inside.any():
        raise BadSampleError(f"subject is too small: nothing of its mask is left at {image_size}x{image_size}")
    if flip and rng is not None and rng.random() < 0.5:
        pixels, inside = pixels.flip(-1), inside.flip(-1)
    return Triplet(to_pixel_values(pixels), to_subject_mask(inside), caption, label, sample["__key__"], full_caption)


def to_pixel_values(picture: UInt8[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
    """Bytes of RGB as floats in [-1, 1]."""
    return picture.float().div_(127.5).sub_(1).contiguous()


def to_subject_mask(mask: UInt8[Tensor, "*batch 1 height width"]) -> Float[Tensor, "*batch 1 height width"]:
    """Bytes of a mask from `open_mask` as 0.0 and 1.0."""
    return mask.gt(0).float()


def _texts(sample: dict[str, Any]) -> tuple[str, str, str]:
    """Caption, label, and the caption as it was before words were taken out (`caption_full`, optional)."""
    if "json" not in sample:
        dotted = next((field for field in sample if field.endswith(".json")), None)
        raise BadSampleError(f"json is missing{f': a key has no dots, or {dotted} is not <key>.json' if dotted else ''}")
    try:
        fields = json.loads(sample["json"])
    except ValueError as error:
        raise BadSampleError(f"json cannot be read: {error}") from error
    for name in ("caption", "label"):
        if not isinstance(fields, dict) or not isinstance(fields.get(name), str) or not fields[name].strip():
            raise BadSampleError(f"{name} is missing")
    caption, label = fields["caption"].strip(), fields["label"].strip()
    full_caption = fields.get("caption_full") or caption
    if not isinstance(full_caption, str):
        raise BadSampleError(f"caption_full is no text: {full_caption!r}")
    try:
        f"{caption}{label}{full_caption}".encode()
    except UnicodeEncodeError as error:
        raise BadSampleError(f"caption holds half a character: {error.reason}") from error
    if not contains_label(caption, label):
        raise BadSampleError(f"label is absent from the caption: {label!r} in {caption!r}")
    return caption, label, full_caption


def _picture_and_mask(sample: dict[str, Any], image_size: int):
    extension = next((e for e in PICTURE_EXTENSIONS if e in sample), None)
    if extension is None:
        raise BadSampleError("picture is missing: none of " + ", ".join(PICTURE_EXTENSIONS))
    if "mask.png" not in sample:
        raise BadSampleError("mask is missing: no mask.png")
    try:
        picture = pictures.open_picture(sample[extension], at_least=image_size)
    except pictures.PICTURE_ERRORS as error:
        raise BadSampleError(f"picture cannot be read: {error}") from error
    try:
        mask = pictures.open_mask(sample["mask.png"], picture.size)
    except pictures.PICTURE_ERRORS as error:
        raise BadSampleError(f"mask cannot be used: {error}") from error
    if mask.getbbox() is None:
        raise BadSampleError(f"mask is empty: no value reaches {pictures.MASK_THRESHOLD}")
    return picture, mask


def _message(error: Exception) -> str:
    """Why, without the stream objects that webdataset appends to an exception's arguments."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error.args[0]).split(" @ ")[0] if error.args else repr(error)


def _files(shard: str) -> Iterator[dict[str, Any]]:
    """Name and content of each file of a local tar, and an empty dict behind the last, as `webdataset.tariterators` has them of any stream.

    A stream ends at a bad header and at a cut between two files as it does at the archive's end mark, and what follows would be lost without a
    word: here it raises tarfile.ReadError. Reading the file itself also saves the copies that a stream makes.
    """
    with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        length = os.fstat(file.fileno()).st_size
        while (member := archive.next()) is not None:
            if member.offset_data + member.size > length and not member.issparse():  # asked for, a damaged header's size might be more than memory has
                raise tarfile.ReadError("unexpected end of data")
            archive.members = []  # type: ignore[attr-defined]  # it remembers all
            if member.isreg() and not META.match(member.name):
                content = archive.extractfile(member)
                assert content is not None
                yield {"fname": member.name, "data": content.read(), "__url__": shard}
        yield {}
        file.seek(archive.offset)
        if not _is_end_mark(file):
            raise tarfile.ReadError("no end of the archive behind its last good file")


def _is_end_mark(rest: BinaryIO) -> bool:
    """Whether two blocks of zeros are left, or more, and nothing else."""
    begun = rest.read(2 * tarfile.BLOCKSIZE)
    return len(begun) == 2 * tarfile.BLOCKSIZE and not any(part.strip(b"\0") for part in itertools.chain([begun], iter(lambda: rest.read(1 << 20), b"")))
