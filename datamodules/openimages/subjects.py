"""One picture and its masks to one or more subjects, or to the named reason why not."""

import io
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from datamodules import pictures
from datamodules.openimages.config import SelectConfig, ShardConfig
from datamodules.openimages.fetch import ChecksumError, MissingError, UnreachableError
from datamodules.openimages.perceptual import perceptual_hash
from datamodules.openimages.sources import Sources

EXIF_ORIENTATION = 0x0112
HASH_SIDE = 64


class RejectedError(ValueError):
    """A mask or picture that is left out; `reason` is a short name, the message says more."""

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(str(detail))
        self.reason = reason


@dataclass
class Subject:
    """A mask's file as it came, and what is known of it: its share of the picture, and its share of the picture's outline."""

    row: dict[str, Any]
    mask: bytes
    area: float
    border: float


@dataclass
class Picture:
    """A checked picture: its bytes as they will be in the shard, its size there, and how masks are to be turned to fit.

    stored_size: (width, height) of the file's own pixels; note: what had to be done to it, or "".
    """

    content: bytes
    size: tuple[int, int]
    stored_size: tuple[int, int]
    orientation: int
    rotation: int
    hash: int
    note: str


def read_subject(row: dict[str, Any], sources: Sources, select: SelectConfig) -> Subject:
    """A candidate's mask, within the bounds of `select`. Raises RejectedError, or UnreachableError where config says so."""
    content = fetch_mask(row["MaskPath"], sources)
    try:
        inside = np.asarray(pictures.open_mask(content)) > 0
    except pictures.PICTURE_ERRORS as error:
        raise RejectedError("mask_broken", error) from error
    area = float(inside.mean())
    subject = Subject(row, content, area, border_of(inside))
    for reason, is_bad in (("mask_empty", area == 0), ("area_too_small", area < select.min_area),
                           ("area_too_large", area > select.max_area), ("at_border", subject.border > select.max_border)):
        if is_bad:
            raise RejectedError(reason, f"area {area:.4f}, border {subject.border:.4f}")
    return subject


def border_of(inside: np.ndarray) -> float:
    """The share of the picture's outline that a mask covers."""
    return float(np.concatenate([inside[0], inside[-1], inside[1:-1, 0], inside[1:-1, -1]]).mean())


def largest(subjects: Sequence[Subject], count: int) -> tuple[list[Subject], list[Subject]]:
    """The `count` largest, and the rest; equal ones by name."""
    ordered = sorted(subjects, key=lambda s: (-s.area, s.row["MaskPath"]))
    return ordered[:count], ordered[count:]


def fetch_mask(name: str, sources: Sources) -> bytes:
    """A mask's file. Raises RejectedError, or UnreachableError where config says so."""
    try:
        return sources.mask(name)
    except MissingError as error:
        raise RejectedError("mask_missing", error) from error
    except zipfile.BadZipFile as error:  # a server or a disk that fails says nothing of the mask, and is not counted as if it did
        raise RejectedError("mask_broken", error) from error
    except UnreachableError as error:
        raise unreachable("mask", error, sources) from error


def fetch(row: dict[str, Any], sources: Sources) -> bytes:
    """A candidate's picture, checked against its metadata. Raises RejectedError, or UnreachableError where config says so."""
    try:
        return sources.picture(row["ImageID"], row["OriginalSize"], row["OriginalMD5"])
    except MissingError as error:
        raise RejectedError("picture_missing", error) from error
    except ChecksumError as error:
        raise RejectedError("picture_checksum", error) from error
    except UnreachableError as error:
        raise unreachable("picture", error, sources) from error


def unreachable(kind: str, error: UnreachableError, sources: Sources) -> Exception:
    """What a server that keeps failing comes to: the run's end, or a picture or mask less."""
    if sources.config.fetch.on_unreachable == "skip":
        return RejectedError(f"{kind}_unreachable", error)
    return UnreachableError(f"{error}, or set sources.fetch.on_unreachable to skip")


def read_picture(content: bytes, rotation: float | None, select: SelectConfig, shards: ShardConfig) -> Picture:
    """Check a picture completely and make it upright 8-bit RGB; bytes that are so already are kept as they are.

    rotation: the metadata's, degrees counter-clockwise; None is 0. Raises RejectedError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _checked(content, int(rotation or 0), select, shards)
    except RejectedError:
        raise
    except Image.DecompressionBombError as error:
        raise RejectedError("picture_too_large", error) from error
    except (*pictures.PICTURE_ERRORS, EOFError, MemoryError, IndexError) as error:
        raise RejectedError("picture_broken", error) from error


def fit_mask(content: bytes, picture: Picture, select: SelectConfig) -> bytes:
    """The mask as a PNG of one bit a pixel, of the picture's size. Raises RejectedError("mask_misfit").

    Masks are of the file's own pixels; one that has the proportions of the picture as its EXIF turns it is taken as such.
    """
    mask = pictures.open_mask(content)
    fitted = _fitted(mask, picture.stored_size, select)
    if fitted is not None:
        mask = _turned(fitted, picture.orientation)
    else:
        turned = picture.stored_size[::-1] if picture.orientation >= 5 else None
        again = turned and _fitted(mask, turned, select)
        if not again:
            raise RejectedError("mask_misfit", f"a mask of {mask.size} for a picture of {picture.stored_size}")
        mask = again
    mask = _rotated(mask, picture.rotation)
    if mask.size != picture.size:
        mask = mask.resize(picture.size, Image.Resampling.NEAREST)
    if mask.getbbox() is None:
        raise RejectedError("mask_empty", "nothing is left at the picture's size")
    return encoded(mask.convert("1", dither=Image.Dither.NONE), "PNG")  # of a bit a pixel a mask is read in half the time


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _checked(content: bytes, rotation: int, select: SelectConfig, shards: ShardConfig) -> Picture:
    picture = Image.open(io.BytesIO(content))
    stored, mode, kind = picture.size, picture.mode, picture.format
    if stored[0] * stored[1] > select.max_pixels:
        raise RejectedError("picture_too_large", f"{stored[0]}x{stored[1]}")
    if getattr(picture, "n_frames", 1) > 1 and kind != "MPO":  # a camera's photograph, with another view or a preview behind it
        raise RejectedError("picture_animated", f"{picture.n_frames} frames")  # type: ignore[attr-defined]
    if min(stored) < select.min_side:
        raise RejectedError("picture_too_small", f"{stored[0]}x{stored[1]}")
    if rotation % 90:
        raise RejectedError("rotation_unknown", rotation)
    orientation = picture.getexif().get(EXIF_ORIENTATION, 1)
    if orientation not in range(1, 9) or rotation:  # the metadata's rotation is of the file's own pixels and says the same
        orientation = 1
    notes = [f"mode {mode}"] if mode != "RGB" else []
    notes += [f"exif {orientation}"] if orientation != 1 else []
    notes += [f"rotation {rotation}"] if rotation else []
    notes += ["scaled"] if max(stored) > shards.max_side else []
    notes += [f"format {kind}"] if kind != "JPEG" else []
    if not notes:
        # A JPEG that is good as it is: decoding it small reads, and so checks, every byte of it at a third of the time.
        picture.draft("RGB", (HASH_SIDE, HASH_SIDE))
        picture.load()
        return Picture(content, stored, stored, 1, 0, perceptual_hash(picture), "")
    if notes == ["scaled"]:
        picture.draft("RGB", (3 * shards.max_side, 3 * shards.max_side))
    opened = picture if notes == ["scaled"] else pictures.open_picture(content, turn=orientation != 1)
    upright = _rotated(opened, rotation)
    upright.thumbnail((shards.max_side, shards.max_side), Image.Resampling.LANCZOS)
    jpeg = encoded(upright, "JPEG", quality=shards.quality, subsampling=0)
    return Picture(jpeg, upright.size, stored, orientation, rotation, perceptual_hash(upright), ", ".join(notes))


def _fitted(mask: Image.Image, size: tuple[int, int], select: SelectConfig) -> Image.Image | None:
    try:
        return pictures.fit_mask(mask, size, select.mask_tolerance)
    except ValueError:
        return None


def _turned(mask: Image.Image, orientation: int) -> Image.Image:
    """As EXIF turns the picture."""
    if orientation == 1:
        return mask
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    mask = mask.copy()
    mask.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(mask)


def _rotated(picture: Image.Image, degrees: int) -> Image.Image:
    """Counter-clockwise, in quarters of a turn."""
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    return picture.transpose(turns[degrees % 360]) if degrees % 360 else picture
