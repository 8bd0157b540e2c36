"""What exists in the mini world: subjects, scenes, poses, and the words for them.

A picture is described by a `Picture`; `render.render` turns a list of them into pixels. Everything is a pure function of
a seed, so identities, and with them the train / held-out split, can be enumerated without drawing anything.
"""

from dataclasses import dataclass

import numpy as np

OBJECTS = ("mug", "car", "bottle", "hat", "ball", "toy robot")
LIVE = ("cat", "duck", "fish", "rabbit")
LABELS = OBJECTS + LIVE

COLORS = {
    "red": (0.86, 0.14, 0.16),
    "orange": (0.97, 0.52, 0.08),
    "yellow": (0.98, 0.86, 0.15),
    "green": (0.16, 0.66, 0.26),
    "blue": (0.15, 0.35, 0.88),
    "purple": (0.52, 0.20, 0.72),
    "pink": (0.97, 0.50, 0.72),
    "teal": (0.10, 0.68, 0.68),
}
ACCENTS = {**COLORS, "white": (0.97, 0.97, 0.97), "black": (0.10, 0.10, 0.12)}
PATTERNS = ("plain", "striped", "dotted", "checkered", "banded", "starred")
MATERIALS = ("wooden", "golden", "stone", "icy", "mossy")
ACCESSORIES = ("a crown", "a scarf", "glasses")

SCENES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "jungle": "in the jungle",
    "desert": "in the desert",
    "city": "in the city",
    "brick": "in front of a brick wall",
    "lake": "on a lake",
    "meadow": "in a meadow",
    "floor": "on the floor",
    "mountain": "in the mountains",
}
LIGHTS = {"day": "", "night": "at night", "sunset": "at sunset"}

# Body colours that would disappear in a scene: such pictures are not drawn.
CLASHES = {"jungle": ("green",), "meadow": ("green",), "desert": ("orange", "yellow"), "beach": ("yellow",),
           "lake": ("blue", "teal"), "brick": ("red", "orange"), "floor": ("orange",)}

#: Words a caption loses before training (paper section 4.1: "filter out color, shape, and texture keywords").
FILTERED_WORDS = frozenset((*COLORS, *PATTERNS, *MATERIALS))


@dataclass(frozen=True)
class Identity:
    """A subject: what must stay the same from picture to picture. `shape` holds 3 proportions in [0, 1]."""

    label: str
    color: str
    accent: str
    pattern: str
    shape: tuple[float, float, float]

    @property
    def is_live(self) -> bool:
        return self.label in LIVE


@dataclass(frozen=True)
class Picture:
    """One picture of one subject. `center` and `scale` are in units of half the picture; `angle` in radians.

    `texture` are the scene's own free parameters, 16 numbers in [0, 1] (clouds, stones, ripples...).
    """

    identity: Identity
    scene: str
    light: str = "day"
    material: str | None = None
    accessory: str | None = None
    center: tuple[float, float] = (0.0, 0.1)
    scale: float = 0.72
    angle: float = 0.0
    flip: bool = False
    texture: tuple[float, ...] = (0.5,) * 16


def sample_identity(rng: np.random.Generator, label: str | None = None) -> Identity:
    label = label or LABELS[rng.integers(len(LABELS))]
    color = tuple(COLORS)[rng.integers(len(COLORS))]
    accents = [name for name in ACCENTS if name != color]
    accent, pattern = accents[rng.integers(len(accents))], PATTERNS[rng.integers(len(PATTERNS))]
    width, height, detail = rng.random(3).round(3).tolist()
    return Identity(label, color, accent, pattern, (width, height, detail))


def identity(split: str, index: int, label: str | None = None) -> Identity:
    """Identity number `index` of a split. Splits are disjoint, decided by `split_of`."""
    rng = np.random.default_rng([20241004, {"train": 0, "heldout": 1}[split], index])
    while True:
        candidate = sample_identity(rng, label)
        if split_of(candidate) == split:
            return candidate


def split_of(subject: Identity) -> str:
    """Each (label, colour, accent, pattern) belongs to one split for good: about one in six is held out."""
    key = (LABELS.index(subject.label) * 7 + tuple(COLORS).index(subject.color) * 5
           + tuple(ACCENTS).index(subject.accent) * 3 + PATTERNS.index(subject.pattern))
    return "heldout" if key % 6 == 0 else "train"


def sample_picture(rng: np.random.Generator, subject: Identity, *, material_rate: float = 0.0,
                   accessory_rate: float = 0.0) -> Picture:
    """A random view of a subject: scene, light, pose, and sometimes another material or an accessory."""
    material = MATERIALS[rng.integers(len(MATERIALS))] if rng.random() < material_rate else None
    scenes = [s for s in SCENES if material or subject.color not in CLASHES.get(s, ())]
    accessory = ACCESSORIES[rng.integers(len(ACCESSORIES))] if rng.random() < accessory_rate else None
    return Picture(
        identity=subject,
        scene=scenes[rng.integers(len(scenes))],
        light=tuple(LIGHTS)[rng.choice(3, p=(0.6, 0.2, 0.2))],
        material=material,
        accessory=accessory if subject.is_live else None,
        center=(float(rng.uniform(-0.1, 0.1)), float(rng.uniform(0.0, 0.14))),
        scale=float(rng.uniform(0.66, 0.84)),
        angle=float(rng.uniform(-0.12, 0.12)),
        flip=bool(rng.random() < 0.5),
        texture=tuple(float(v) for v in rng.random(16).round(4)),
    )


def caption(picture: Picture) -> str:
    """The full caption, with colour, pattern and material words: what the base model is taught with."""
    subject = picture.identity
    if picture.material:
        look = [picture.material]
    else:
        look = [subject.color] + ([subject.pattern] if subject.pattern != "plain" else [])
    words = [_article(look[0]), *look, subject.label]
    if picture.accessory:
        words += ["wearing", picture.accessory]
    words += [SCENES[picture.scene], LIGHTS[picture.light]]
    return " ".join(w for w in words if w)


def filter_caption(text: str) -> str:
    """Drop colour, pattern and material words (paper section 4.1) and mend the article before what follows."""
    words = [w for w in text.split() if w not in FILTERED_WORDS]
    for i, word in enumerate(words[:-1]):
        if word in ("a", "an"):
            words[i] = _article(words[i + 1])
    return " ".join(words)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
