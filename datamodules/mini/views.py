"""Poses and camera distances of the mini world (Figure 10, upper panel): how a picture is turned or framed, and the words that say so.

The shards, and with them the shipped base models, have none of these. `experiments/mini/recipe/views.py` fine-tunes the base to them,
as a community checkpoint; the adapters stay as they are.
"""

import math
from dataclasses import dataclass, replace

from datamodules.mini.world import Picture


@dataclass(frozen=True)
class View:
    """angle: added to the subject's own, in radians, clockwise on screen. scale: instead of its own, None to keep it."""

    angle: float = 0.0
    scale: float | None = None


POSES = {"upside down": View(angle=math.pi), "on its side": View(angle=math.pi / 2)}
CAMERAS = {"up close": View(scale=1.2), "far away": View(scale=0.42)}
VIEWS = {**POSES, **CAMERAS}


def seen(picture: Picture, words: str) -> Picture:
    """The same picture in a pose or at a distance of `VIEWS`."""
    view = VIEWS[words]
    return replace(picture, angle=picture.angle + view.angle, scale=view.scale or picture.scale)


def say(words: str, caption: str, label: str) -> str:
    """`caption` with the view named behind the (last) label: "a cat in the snow" -> "a cat upside down in the snow"."""
    before, label, after = caption.rpartition(label)
    return f"{before}{label} {words}{after}"
