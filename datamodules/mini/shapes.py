"""Subjects as signed distance functions, in coordinates where the subject fills [-1, 1] x [-1, 1], y pointing down.

Each drawing function takes `x, y` of shape [batch, height, width] and the identity's proportions `p` (three arrays of
shape [batch, 1, 1] in [0, 1]) and returns layers from back to front: (role, signed distance).
Roles are colours: "body" (with the pattern), "accent", and the fixed ones of `render.FIXED`.
"""

import numpy as np


def circle(x, y, cx, cy, r):
    return np.hypot(x - cx, y - cy) - r


def ellipse(x, y, cx, cy, rx, ry):
    k = np.hypot((x - cx) / rx, (y - cy) / ry)
    return (k - 1) * np.minimum(rx, ry)


def box(x, y, cx, cy, hx, hy, r=0.06):
    dx, dy = np.abs(x - cx) - (hx - r), np.abs(y - cy) - (hy - r)
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - r


def capsule(x, y, ax, ay, bx, by, r):
    ux, uy = bx - ax, by - ay
    t = np.clip(((x - ax) * ux + (y - ay) * uy) / (ux * ux + uy * uy), 0, 1)
    return np.hypot(x - ax - t * ux, y - ay - t * uy) - r


def triangle(x, y, *corners):
    """Convex triangle with corners in clockwise order on screen; the largest of the three edge distances."""
    sides = []
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        nx, ny = by - ay, ax - bx
        sides.append(((x - ax) * nx + (y - ay) * ny) / np.hypot(nx, ny))
    return np.maximum.reduce(sides)


def _eyes(x, y, cx, cy, gap, r=0.085):
    layers = []
    for side in (-1, 1):
        layers += [("white", circle(x, y, cx + side * gap, cy, r * 1.5)), ("dark", circle(x, y, cx + side * gap, cy, r))]
    return layers


def mug(x, y, p):
    w = 0.48 + 0.14 * p[0]
    handle = np.abs(ellipse(x, y, w, 0.08, 0.32 + 0.1 * p[1], 0.38)) - 0.1
    return [("accent", handle), ("body", box(x, y, -0.12, 0.1, w, 0.78, 0.14)),
            ("accent", box(x, y, -0.12, -0.66, w, 0.12 + 0.06 * p[2], 0.08))]


def car(x, y, p):
    roof = 0.42 + 0.16 * p[0]
    return [("body", box(x, y, -0.05, -0.3, roof, 0.38 + 0.1 * p[1], 0.2)),
            ("white", box(x, y, -0.05 - roof * 0.45, -0.34, roof * 0.34, 0.2, 0.06)),
            ("white", box(x, y, -0.05 + roof * 0.45, -0.34, roof * 0.34, 0.2, 0.06)),
            ("body", box(x, y, 0, 0.2, 0.98, 0.34, 0.16)),
            ("accent", box(x, y, 0, 0.2, 0.98, 0.07)),
            *[layer for cx in (-0.55, 0.55) for layer in
              (("dark", circle(x, y, cx, 0.52, 0.26 + 0.05 * p[2])), ("accent", circle(x, y, cx, 0.52, 0.13)))]]


def bottle(x, y, p):
    w = 0.36 + 0.14 * p[0]
    shoulder = 0.3 * p[1] - 0.25
    return [("body", box(x, y, 0, -0.55, 0.17, 0.4, 0.05)),
            ("body", box(x, y, 0, (1 + shoulder) / 2, w, (1 - shoulder) / 2, 0.18)),
            ("body", triangle(x, y, (0 * w, shoulder - 0.5), (w, shoulder + 0.16), (-w, shoulder + 0.16))),
            ("accent", box(x, y, 0, -0.85, 0.22, 0.15, 0.05)),
            ("accent", box(x, y, 0, 0.72, w, 0.09 + 0.07 * p[2], 0.02))]


def hat(x, y, p):
    w, top = 0.5 + 0.12 * p[0], -0.7 - 0.25 * p[1]
    return [("body", box(x, y, 0, (0.5 + top) / 2, w, (0.5 - top) / 2, 0.2)),
            ("accent", box(x, y, 0, 0.26, w, 0.13 + 0.05 * p[2], 0.02)),
            ("body", box(x, y, 0, 0.52, 0.99, 0.2, 0.2))]


def ball(x, y, p):
    r = 0.8 + 0.14 * p[0]
    ring = np.abs(circle(x, y, -0.9 + 0.3 * p[1], 0, 0.9)) - 0.09 - 0.05 * p[2]
    return [("body", circle(x, y, 0, 0, r)), ("accent", np.maximum(ring, circle(x, y, 0, 0, r))),
            ("white", ellipse(x, y, 0.34, -0.46, 0.15, 0.1))]


def toy_robot(x, y, p):
    head = 0.36 + 0.12 * p[0]
    return [("dark", capsule(x, y, 0, -0.95, 0, -0.7, 0.05)), ("accent", circle(x, y, 0, -0.93, 0.09 + 0.05 * p[1])),
            ("accent", capsule(x, y, -0.66, 0.0, -0.74, 0.45, 0.12)), ("accent", capsule(x, y, 0.66, 0.0, 0.74, 0.45, 0.12)),
            ("dark", box(x, y, -0.27, 0.85, 0.17, 0.15)), ("dark", box(x, y, 0.27, 0.85, 0.17, 0.15)),
            ("body", box(x, y, 0, 0.32, 0.56, 0.46, 0.1)), ("body", box(x, y, 0, -0.46, head, 0.32, 0.1)),
            *_eyes(x, y, 0, -0.48, 0.19), ("accent", box(x, y, 0, 0.6, 0.3, 0.07 + 0.06 * p[2], 0.04))]


def cat(x, y, p):
    ear = -0.95 - 0.05 * p[0]
    head = 0.44 + 0.06 * p[1]
    return [("accent", capsule(x, y, 0.5, 0.8, 0.86, 0.1 + 0.3 * p[2], 0.1)),
            ("body", ellipse(x, y, 0, 0.52, 0.56, 0.48)),
            ("body", triangle(x, y, (-0.5, ear), (-0.02, -0.5), (-0.46, -0.2))),
            ("body", triangle(x, y, (0.5, ear), (0.46, -0.2), (0.02, -0.5))),
            ("body", ellipse(x, y, 0, -0.28, head + 0.06, head)),
            ("accent", ellipse(x, y, 0, 0.66, 0.28, 0.28)),
            *_eyes(x, y, 0, -0.34, 0.22), ("dark", ellipse(x, y, 0, -0.1, 0.09, 0.06))]


def duck(x, y, p):
    return [("accent", ellipse(x, y, 0.84, -0.36, 0.2 + 0.06 * p[0], 0.11)),
            ("body", triangle(x, y, (-0.98, -0.02 - 0.2 * p[1]), (-0.3, 0.2), (-0.6, 0.7))),
            ("body", ellipse(x, y, -0.05, 0.38, 0.8, 0.52)),
            ("body", circle(x, y, 0.42, -0.42, 0.38)),
            ("accent", ellipse(x, y, -0.2, 0.36, 0.34 + 0.1 * p[2], 0.22)),
            ("white", circle(x, y, 0.52, -0.5, 0.13)), ("dark", circle(x, y, 0.54, -0.5, 0.08))]


def fish(x, y, p):
    tail = 0.4 + 0.22 * p[0]
    return [("accent", triangle(x, y, (-0.4, 0 * tail), (-0.98, tail), (-0.98, -tail))),
            ("accent", triangle(x, y, (0.0, -0.86 - 0.1 * p[1]), (0.34, -0.3), (-0.36, -0.3))),
            ("body", ellipse(x, y, 0.16, 0, 0.82, 0.54 + 0.08 * p[2])),
            ("accent", ellipse(x, y, 0.05, 0.14, 0.17, 0.1)),
            ("white", circle(x, y, 0.6, -0.12, 0.15)), ("dark", circle(x, y, 0.63, -0.12, 0.09))]


def rabbit(x, y, p):
    ear, tilt = 0.38 + 0.1 * p[0], 0.16 + 0.14 * p[1]
    ears = [(role, ellipse(x, y, side * tilt, -0.62, w, ear * h)) for side in (-1, 1)
            for role, w, h in (("body", 0.15, 1.0), ("accent", 0.07, 0.7))]
    return [*ears, ("body", ellipse(x, y, 0, 0.58, 0.52, 0.42)), ("body", circle(x, y, 0, -0.02, 0.4)),
            ("accent", ellipse(x, y, 0, 0.68, 0.22 + 0.08 * p[2], 0.24)), ("white", circle(x, y, 0.56, 0.72, 0.15)),
            *_eyes(x, y, 0, -0.06, 0.19), ("dark", ellipse(x, y, 0, 0.15, 0.07, 0.05))]


DRAWINGS = {"mug": mug, "car": car, "bottle": bottle, "hat": hat, "ball": ball, "toy robot": toy_robot,
            "cat": cat, "duck": duck, "fish": fish, "rabbit": rabbit}

#: Where accessories sit on each live subject: head centre x, y and radius; neck x, y and half width.
HEADS = {"cat": (0, -0.28, 0.46, 0, 0.16, 0.4), "duck": (0.42, -0.42, 0.38, 0.34, -0.06, 0.32),
         "fish": (0.5, -0.05, 0.5, 0.3, 0.35, 0.3), "rabbit": (0, -0.02, 0.4, 0, 0.36, 0.36)}


def accessory(kind, label, x, y):
    """Layers of an accessory, fixed colours (red scarf, yellow crown, dark glasses)."""
    cx, cy, r, nx, ny, w = HEADS[label]
    if kind == "a crown":
        top = cy - r
        spikes = [triangle(x, y, (cx + d, top - 0.26), (cx + d + 0.14, top + 0.08), (cx + d - 0.14, top + 0.08))
                  for d in (-0.2, 0.0, 0.2)]
        return [("crown", np.minimum.reduce([*spikes, box(x, y, cx, top + 0.08, 0.33, 0.11, 0.02)]))]
    if kind == "a scarf":
        return [("scarf", np.minimum(box(x, y, nx, ny, w, 0.12, 0.1), box(x, y, nx + w * 0.5, ny + 0.24, 0.11, 0.24, 0.05)))]
    return [("dark", np.minimum.reduce([circle(x, y, cx - 0.2, cy - 0.06, 0.18), circle(x, y, cx + 0.2, cy - 0.06, 0.18),
                                        box(x, y, cx, cy - 0.08, 0.3, 0.045, 0.01)]))]
