"""From `Picture` descriptions to pixels and exact masks: vectorised over pictures that share a scene, then a label."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from datamodules.mini import scenes, shapes
from datamodules.mini.world import ACCENTS, COLORS, PATTERNS, Picture

FIXED = {"dark": (0.13, 0.12, 0.15), "white": (0.97, 0.97, 0.97), "crown": (0.99, 0.82, 0.1), "scarf": (0.85, 0.1, 0.15)}
OUTLINE = np.asarray((0.09, 0.08, 0.11), np.float32)


def render(
    pictures: Sequence[Picture], size: int = 64
) -> tuple[UInt8[np.ndarray, "batch size size 3"], UInt8[np.ndarray, "batch size size"]]:
    """Draw pictures; returns RGB in 0..255 and masks that are 255 where the subject (with its outline) is."""
    canvas = np.empty((len(pictures), size, size, 3), np.float32)
    mask = np.empty((len(pictures), size, size), np.float32)
    for (scene, light), rows in _grouped(pictures, lambda p: (p.scene, p.light)).items():
        canvas[rows] = _scene(scene, light, [pictures[i] for i in rows], size)
    for (label, accessory), rows in _grouped(pictures, lambda p: (p.identity.label, p.accessory)).items():
        canvas[rows], mask[rows] = _subject(label, accessory, [pictures[i] for i in rows], canvas[rows])
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8), ((mask > 0.5) * 255).astype(np.uint8)


def _grouped(pictures, key):
    groups = defaultdict(list)
    for i, picture in enumerate(pictures):
        groups[key(picture)].append(i)
    return groups


def _scene(scene, light, pictures, size):
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    u, v = axis[None, None, :], axis[None, :, None]
    u, v = np.broadcast_arrays(u, v)
    t = np.asarray([p.texture for p in pictures], np.float32)[:, :, None, None]
    return scenes.relight(scenes.DRAWINGS[scene](u, v, t), light, v)


def _subject(label, accessory, pictures, canvas):
    size = canvas.shape[1]
    x, y, pixel = _subject_coordinates(pictures, size)
    proportions = np.asarray([p.identity.shape for p in pictures], np.float32).T[:, :, None, None]
    layers = shapes.DRAWINGS[label](x, y, proportions)
    if accessory:
        layers = layers + shapes.accessory(accessory, label, x, y)
    silhouette = np.minimum.reduce([np.broadcast_to(d, x.shape) for _, d in layers])
    outer = _coverage(silhouette - 1.3 * pixel, pixel)
    canvas = canvas + (OUTLINE - canvas) * outer[..., None]
    colors = _role_colors(pictures, x, y)
    for role, distance in layers:
        canvas = canvas + (colors(role) - canvas) * _coverage(distance, pixel)[..., None]
    return canvas, outer


def _subject_coordinates(pictures, size):
    """Picture pixels in the subject's own frame, and one pixel's width in it."""
    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    pose = np.asarray([(*p.center, p.scale, p.angle, -1.0 if p.flip else 1.0) for p in pictures], np.float32)
    cx, cy, scale, angle, flip = (pose[:, i, None, None] for i in range(5))
    dx, dy = axis[None, None, :] - cx, axis[None, :, None] - cy
    x = (np.cos(angle) * dx + np.sin(angle) * dy) / scale * flip
    y = (-np.sin(angle) * dx + np.cos(angle) * dy) / scale
    return x, y, 2 / size / scale


def _coverage(distance, pixel):
    return np.clip(0.5 - distance / pixel, 0, 1)


def _role_colors(pictures, x, y):
    """A function from a layer's role to its colours [batch, height, width, 3]."""
    body, accent = (np.asarray(table, np.float32)[:, None, None, :] for table in
                    ([COLORS[p.identity.color] for p in pictures], [ACCENTS[p.identity.accent] for p in pictures]))
    painted = body + (accent - body) * _pattern([p.identity.pattern for p in pictures], x, y)[..., None]
    painted = painted * (1.06 - 0.16 * (x + y).clip(-1, 1) / 2)[..., None]
    accent = np.broadcast_to(accent, painted.shape).copy()
    for i, picture in enumerate(pictures):
        if picture.material:
            painted[i] = MATERIAL_DRAWINGS[picture.material](x[i], y[i])
            accent[i] = painted[i] * 0.72
    return lambda role: {"body": painted, "accent": accent}[role] if role in ("body", "accent") else np.asarray(FIXED[role], np.float32)


def _pattern(names, x, y):
    """Weight of the accent colour over the body, in [0, 1], in the subject's own frame."""
    star_angle = np.arctan2(y - 0.15, x)
    star = np.hypot(x, y - 0.15) - 0.3 * (0.72 + 0.28 * np.cos(5 * (star_angle + np.pi / 2)))
    drawings = {
        "plain": lambda i: 0 * x[i],
        "striped": lambda i: _soft(np.abs((y[i] / 0.4) % 1 - 0.5) - 0.24, 0.2),
        "dotted": lambda i: _soft(np.hypot((x[i] / 0.42) % 1 - 0.5, (y[i] / 0.42) % 1 - 0.5) - 0.29, 0.16),
        "checkered": lambda i: _soft(np.sin(np.pi * x[i] / 0.33) * np.sin(np.pi * y[i] / 0.33), 0.4),
        "banded": lambda i: _soft(np.abs(x[i] * 0.8 + y[i] - 0.1) - 0.22, 0.08),
        "starred": lambda i: _soft(star[i], 0.06),
    }
    assert set(drawings) == set(PATTERNS)
    return np.stack([drawings[name](i) for i, name in enumerate(names)])


def _soft(distance, width):
    return np.clip(0.5 - distance / width, 0, 1)


def _wood(x, y):
    grain = np.sin(14 * (y + 0.12 * np.sin(3 * x)))[..., None]
    return np.asarray((0.58, 0.37, 0.18), np.float32) + grain * np.asarray((0.14, 0.1, 0.06), np.float32)


def _gold(x, y):
    shine = np.clip(np.cos(3.2 * (x + y) + 0.5), -1, 1)[..., None]
    return np.asarray((0.88, 0.68, 0.16), np.float32) + shine * np.asarray((0.14, 0.2, 0.3), np.float32)


def _stone(x, y):
    speckle = (np.sin(9 * x + 4 * np.sin(5 * y)) * np.sin(8 * y + 3 * np.sin(6 * x)))[..., None]
    return np.asarray((0.52, 0.52, 0.53), np.float32) + 0.16 * speckle * np.ones(3, np.float32)


def _ice(x, y):
    streak = np.clip(np.sin(5 * (x - y)) - 0.3, 0, 1)[..., None]
    return np.asarray((0.62, 0.86, 0.96), np.float32) + streak * np.asarray((0.34, 0.14, 0.04), np.float32)


def _moss(x, y):
    tuft = (np.sin(11 * x + 3 * np.sin(7 * y)) * np.sin(10 * y + 2 * np.sin(8 * x)))[..., None]
    return np.asarray((0.24, 0.38, 0.12), np.float32) + tuft * np.asarray((0.12, 0.2, 0.06), np.float32)


MATERIAL_DRAWINGS = {"wooden": _wood, "golden": _gold, "stone": _stone, "icy": _ice, "mossy": _moss}
