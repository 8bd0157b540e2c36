"""The prompts of dreambooth-mini, in google/dreambooth's file format and in the mini world's own words.

The mini CLIP and the mini base know the words of `world.caption` only, in that order, and always with a scene.
"""

from datamodules.mini.views import CAMERAS, POSES
from datamodules.mini.world import ACCESSORIES, LIGHTS, SCENES

#: (accessory, scene) of the live prompts that replace some of the objects' lit scenes.
WORN = tuple(zip((*ACCESSORIES, *ACCESSORIES, *ACCESSORIES[:2]),
                 ("beach", "snow", "city", "meadow", "mountain", "lake", "floor", "brick"), strict=True))

TEXTURES = ("a wooden {0} {1} on the beach", "a golden {0} {1} in the snow", "a stone {0} {1} in a meadow",
            "an icy {0} {1} in the city", "a mossy {0} {1} on the floor", "a red {0} {1} in the snow",
            "a yellow {0} {1} in the city", "a blue {0} {1} in the mountains", "a purple {0} {1} on the beach",
            "a pink {0} {1} in a meadow")


def object_prompts() -> list[str]:
    """25: every scene by day, 8 at night, 7 at sunset."""
    scenes = tuple(SCENES)
    return [*map(_context, scenes), *(_context(s, "night") for s in scenes[:8]), *(_context(s, "sunset") for s in scenes[3:])]


def live_prompts() -> list[str]:
    """25: every scene by day, 4 at night, 3 at sunset, 8 wearing something."""
    scenes = tuple(SCENES)
    return [*map(_context, scenes), *(_context(s, "night") for s in scenes[:4]), *(_context(s, "sunset") for s in scenes[4:7]),
            *(f"a {{0}} {{1}} wearing {worn} {SCENES[scene]}" for worn, scene in WORN)]


def prompts_and_classes(labels: dict[str, str]) -> str:
    """The text of `prompts_and_classes.txt` for classes by subject name."""
    table = "\n".join(f"{name},{label}" for name, label in labels.items())
    return (f"Classes\n\nsubject_name,class\n{table}\n\nPrompts\n\nObject Prompts\n\n{_listing(object_prompts())}\n"
            f"Live Subject Prompts\n\n{_listing(live_prompts())}")


def texture_prompts() -> str:
    """The text of `texture_prompts.txt`: our 5 materials and 5 colours, as one list."""
    return _listing(list(TEXTURES))


def view_prompts() -> dict[str, str]:
    """The texts of `pose_prompts.txt` and `camera_prompts.txt`, by kind: each view in four scenes."""
    scenes = [SCENES[scene] for scene in ("beach", "snow", "city", "meadow")]
    return {kind: _listing([f"a {{0}} {{1}} {words} {scene}" for words in views for scene in scenes])
            for kind, views in (("pose", POSES), ("camera", CAMERAS))}


def _context(scene: str, light: str = "day") -> str:
    return " ".join(["a {0} {1}", SCENES[scene], LIGHTS[light]]).strip()


def _listing(prompts: list[str]) -> str:
    lines = ",\n".join(f"'{prompt}'.format(unique_token, class_token)" for prompt in prompts)
    return f"prompt_list = [\n{lines}\n]\n"
