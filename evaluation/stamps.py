"""Pictures on disk: each written beside and renamed, with a JSON stamp that says how it was made.

A picture counts only with its stamp: the settings decide whether it is kept, and the digest tells a whole file from half
a one. The stamp goes first when a picture is replaced and comes last, so a kill at any moment leaves work to redo, never a
wrong score.
"""

import hashlib
import io
import json
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from moma_lightning.digests import same_identity
from moma_lightning.files import write_bytes
from moma_lightning.pictures import is_black, to_rgb


def stamp_path(picture: Path) -> Path:
    return picture.with_suffix(".json")


def write_picture(path: Path, image: Image.Image, settings: dict[str, Any], provenance: dict[str, Any]) -> None:
    """settings: what the picture depends on. provenance: what is only told (revision, protocol)."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    content = buffer.getvalue()
    stamp = {"settings": settings, "sha256": hashlib.sha256(content).hexdigest(), "provenance": provenance}
    stamp_path(path).unlink(missing_ok=True)
    write_bytes(path, content, durable=False)  # the digest tells after a power cut
    write_bytes(stamp_path(path), json.dumps(stamp, indent=1, sort_keys=True).encode(), durable=False)


def read_stamp(picture: Path) -> dict[str, Any] | None:
    """The stamp beside a picture, or None where there is none that can be read."""
    try:
        stamp = json.loads(stamp_path(picture).read_text())
    except (FileNotFoundError, ValueError):  # no JSON, or no text at all
        return None
    return stamp if isinstance(stamp, dict) else None


def is_current(picture: Path, settings: dict[str, Any]) -> bool:
    """Whether the picture is there, whole, and made with these settings; one at None is as one that is not there, which it may not have been yet."""
    stamp = read_stamp(picture)
    if stamp is None or not are_same(stamp.get("settings"), json.loads(json.dumps(settings))) or not picture.exists():
        return False
    return hashlib.sha256(picture.read_bytes()).hexdigest() == stamp.get("sha256")


def are_same(then: Any, now: dict[str, Any]) -> bool:
    """Nested settings; those called weights are identities of models."""
    then, now = without_none(then), without_none(now)
    if not isinstance(then, dict) or then.keys() != now.keys():
        return False
    return all(same_identity(then[name], now[name]) if name == "weights" else then[name] == now[name] for name in now)


def without_none(settings: Any) -> Any:
    """Nested settings without those at None."""
    return {name: without_none(value) for name, value in settings.items() if value is not None} if isinstance(settings, dict) else settings


def load_picture(path: Path) -> Image.Image:
    """A decoded RGB picture, upright as its EXIF says, on white where transparent. Raises OSError naming a file that is missing, cut short or no picture."""
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except Exception as error:
        raise OSError(f"{path} is not a whole picture ({error}): restore it, or delete it and generate again") from error


def load_pictures(paths: Sequence[Path], threads: int) -> list[Image.Image]:
    """`load_picture` of each, in order, on at most `threads` threads: decoding holds no interpreter lock."""
    if threads == 1:
        return [load_picture(path) for path in paths]
    with ThreadPoolExecutor(max(1, min(threads, len(paths))), "picture-reader") as pool:
        return list(pool.map(load_picture, paths))


def refuse_black(pictures: Mapping[str, Image.Image]) -> None:
    """Raises ValueError with the names of those that are all black: what hid them is none of the method's, and would be scored as its own."""
    if black := [name for name, picture in pictures.items() if is_black(picture)]:
        raise ValueError(f"{'; '.join(black)}: all black, as safety checkers leave a picture, or values that are not finite in 16 bits; draw it again (where "
                         "it is there, delete it first) without the checker, or in bfloat16")


@cache
def git_revision() -> str | None:
    """The checkout's commit, with `-dirty` where tracked files differ from it; None outside a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
