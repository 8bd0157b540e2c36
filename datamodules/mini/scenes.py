"""Scenes: functions of picture coordinates `u, v` in [0, 1] (v down, [1, height, width]) and 16 free parameters `t`
([batch, 16, 1, 1] in [0, 1]), returning colours [batch, height, width, 3] in [0, 1]. Calm on purpose: what varies
within a scene (horizon, hills, clouds, bricks' offset) is low in frequency so that a small autoencoder keeps it.
"""

import numpy as np


def _mix(a, b, weight):
    return a + (b - a) * weight[..., None]


def _rgb(*value):
    return np.asarray(value, np.float32)


def _step(distance, softness=0.02):
    return np.clip(0.5 - distance / softness, 0, 1)


def _horizon(t, low=0.42, high=0.58):
    return low + (high - low) * t[:, 0]


def _sky(u, v, t, top, bottom):
    return _mix(_rgb(*top), _rgb(*bottom), np.clip(v * 1.6 + 0 * t[:, 0], 0, 1))


def _hills(u, t, base, height, k):
    return base - height * (0.6 * np.sin(2 * np.pi * (u * (1 + t[:, k]) + t[:, k + 1])) + 0.4 * np.sin(2 * np.pi * (u * 2.3 + t[:, k + 2])))


def _blobs(u, v, t, first, count, rx, ry, y0, y1):
    """Signed distance to `count` ellipses placed by the parameters from `first` on."""
    out = np.full(np.broadcast_shapes(u.shape, t[:, 0].shape), 1.0, np.float32)
    for i in range(count):
        cx, cy = t[:, (first + 2 * i) % 16], y0 + (y1 - y0) * t[:, (first + 2 * i + 1) % 16]
        out = np.minimum(out, (np.hypot((u - cx) / rx, (v - cy) / ry) - 1) * min(rx, ry))
    return out


def beach(u, v, t):
    h = _horizon(t)
    picture = _mix(_sky(u, v, t, (0.35, 0.68, 0.95), (0.75, 0.9, 0.98)), _rgb(0.1, 0.45, 0.72), _step(h - v))
    shore = h + 0.14 + 0.02 * np.sin(2 * np.pi * (u * 1.5 + t[:, 1]))
    picture = _mix(picture, _rgb(0.95, 0.97, 0.98), _step(shore - 0.025 - v))
    return _mix(picture, _rgb(0.93, 0.82, 0.56), _step(shore - v))


def snow(u, v, t):
    picture = _sky(u, v, t, (0.66, 0.76, 0.86), (0.86, 0.9, 0.95))
    for i in range(4):
        cx, base = (i + t[:, 1 + i]) / 4, _horizon(t) + 0.06
        tree = np.maximum(np.abs(u - cx) * 2.2 - (v - base + 0.36) * 0.6, v - base)
        picture = _mix(picture, _rgb(0.22, 0.4, 0.36), _step(tree, 0.03))
    return _mix(picture, _rgb(0.95, 0.97, 1.0), _step(_hills(u, t, _horizon(t) + 0.06, 0.03, 5) - v))


def jungle(u, v, t):
    picture = _mix(_rgb(0.05, 0.3, 0.12), _rgb(0.1, 0.42, 0.14), np.clip(v + 0 * t[:, 0], 0, 1))
    picture = _mix(picture, _rgb(0.2, 0.58, 0.18), _step(_blobs(u, v, t, 0, 7, 0.15, 0.07, 0.0, 0.7)))
    picture = _mix(picture, _rgb(0.36, 0.72, 0.24), _step(_blobs(u, v, t, 5, 6, 0.07, 0.13, 0.0, 0.75)))
    return _mix(picture, _rgb(0.26, 0.2, 0.1), _step(_hills(u, t, 0.86, 0.02, 2) - v))


def desert(u, v, t):
    picture = _sky(u, v, t, (0.5, 0.75, 0.92), (0.95, 0.88, 0.7))
    picture = _mix(picture, _rgb(0.86, 0.6, 0.3), _step(_hills(u, t, _horizon(t), 0.07, 1) - v))
    return _mix(picture, _rgb(0.94, 0.72, 0.4), _step(_hills(u, t, _horizon(t) + 0.2, 0.06, 4) - v))


def city(u, v, t):
    picture = _sky(u, v, t, (0.55, 0.65, 0.78), (0.8, 0.85, 0.9))
    for i in range(5):
        cx, top = (i + 0.5) / 5, 0.08 + 0.3 * t[:, 1 + i]
        tower = np.maximum(np.abs(u - cx) - 0.09, top - v)
        shade = 0.34 + 0.16 * t[:, 7 + i]
        picture = _mix(picture, np.stack([shade, shade, shade * 1.1], -1), _step(tower))
        window = np.maximum(np.abs((u - cx) % 0.09 - 0.045) - 0.018, np.abs(v % 0.12 - 0.06) - 0.025)
        picture = _mix(picture, _rgb(0.95, 0.88, 0.55), _step(np.maximum(window, tower + 0.02)))
    return _mix(picture, _rgb(0.3, 0.3, 0.33), _step(0.72 + 0.04 * (t[:, 0] - 0.5) - v))


def brick(u, v, t):
    rows = (v + t[:, 0] * 0.16) / 0.16
    columns = (u + t[:, 1] * 0.3) / 0.3 + 0.5 * (np.floor(rows) % 2)
    edge = np.minimum(0.5 - np.abs(rows % 1 - 0.5), (0.5 - np.abs(columns % 1 - 0.5)) * 1.9) * 0.16
    wall = _mix(_rgb(0.8, 0.72, 0.66), _rgb(0.62, 0.28, 0.2), _step(0.012 - edge))
    return _mix(wall, _rgb(0.5, 0.48, 0.46), _step(0.82 + 0.06 * t[:, 2] - v))


def lake(u, v, t):
    picture = _sky(u, v, t, (0.6, 0.8, 0.95), (0.85, 0.93, 0.97))
    picture = _mix(picture, _rgb(0.3, 0.52, 0.35), _step(_hills(u, t, 0.34, 0.05, 3) - v))
    water = 0.38 + 0.08 * t[:, 0]
    picture = _mix(picture, _rgb(0.16, 0.5, 0.8), _step(water - v))
    ripple = np.sin(2 * np.pi * (v * 7 + 0.15 * np.sin(2 * np.pi * (u * 2 + t[:, 1])) + t[:, 2]))
    return _mix(picture, _rgb(0.5, 0.76, 0.94), _step(water - v) * np.clip(ripple - 0.5, 0, 1))


def meadow(u, v, t):
    picture = _sky(u, v, t, (0.4, 0.72, 0.97), (0.8, 0.92, 0.98))
    picture = _mix(picture, _rgb(0.98, 0.98, 0.99), _step(_blobs(u, v, t, 8, 2, 0.18, 0.06, 0.08, 0.26), 0.04))
    picture = _mix(picture, _rgb(0.48, 0.75, 0.3), _step(_hills(u, t, _horizon(t), 0.04, 1) - v))
    return _mix(picture, _rgb(0.98, 0.9, 0.95), _step(_blobs(u, v, t, 3, 6, 0.03, 0.03, 0.65, 0.98)))


def floor(u, v, t):
    wall = 0.5 + 0.12 * t[:, 0]
    picture = np.broadcast_to(_rgb(0.86, 0.84, 0.78), (*np.broadcast_shapes(u.shape, wall.shape), 3))
    picture = _mix(picture, _rgb(0.97, 0.97, 0.95), _step(wall - 0.05 - v))
    picture = _mix(picture, _rgb(0.68, 0.45, 0.24), _step(wall - v))
    slant = (u - 0.5) / (v + 0.35) * 4.5 + t[:, 1]
    return _mix(picture, _rgb(0.5, 0.31, 0.15), _step(wall - v) * _step(0.5 - np.abs(slant % 1 - 0.5) - 0.06, 0.08))


def mountain(u, v, t):
    picture = _sky(u, v, t, (0.5, 0.72, 0.95), (0.85, 0.92, 0.97))
    for i, (cx, h) in enumerate(((0.15, 0.14), (0.5, 0.22), (0.85, 0.1))):
        top = h + 0.14 * t[:, 1 + i]
        side = np.abs(u - cx - 0.2 * (t[:, 5 + i] - 0.5)) * 1.5 - (v - top)
        picture = _mix(picture, _rgb(0.45, 0.47, 0.56), _step(side))
        picture = _mix(picture, _rgb(0.96, 0.97, 1.0), _step(np.maximum(side, v - top - 0.13)))
    return _mix(picture, _rgb(0.38, 0.55, 0.36), _step(_hills(u, t, 0.74, 0.03, 9) - v))


DRAWINGS = {"beach": beach, "snow": snow, "jungle": jungle, "desert": desert, "city": city, "brick": brick,
            "lake": lake, "meadow": meadow, "floor": floor, "mountain": mountain}


def relight(picture, light, v):
    """Night darkens to blue, sunset warms from the top; only the scene is lit, the subject keeps its colours."""
    if light == "night":
        return picture * _rgb(0.28, 0.32, 0.5) + _rgb(0.0, 0.0, 0.05)
    if light == "sunset":
        return _mix(picture, _rgb(0.98, 0.45, 0.2), np.clip(0.75 - 0.5 * v, 0, 1) * np.ones(picture.shape[:1] + (1, 1), np.float32))
    return picture
