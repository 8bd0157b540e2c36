"""How the mini world is drawn, and what its shipped models draw and say, against numbers kept in tests/golden/mini.json. A missing golden fails.

After a change that is meant to move them: `python -m tests.test_golden` writes them anew; look at the pictures, and say why
in the commit.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.mini import world
from datamodules.mini.render import render
from experiments.mini.models import mini_foundation
from experiments.mini.recipe.common import to_pixels
from moma_lightning.pipeline import load_pipeline

GOLDEN = Path(__file__).parent / "golden" / "mini.json"
TOLERANCE = 0.02  # of [0, 1]; other processors and library builds round differently, a wrong sampler is far outside
DRAWN_TOLERANCE = 0.002  # no model is in it: half a level of 255, or eight pixels of a mask
#: Label, colour, accent, pattern, scene, light, material, accessory: all of the world's words, colours and patterns also where no material hides them.
EVERYTHING = [
    ("mug", "red", "white", "plain", "beach", "day", None, None),
    ("car", "orange", "black", "striped", "snow", "night", None, None),
    ("bottle", "yellow", "red", "dotted", "jungle", "sunset", None, None),
    ("hat", "green", "orange", "checkered", "desert", "day", None, None),
    ("ball", "blue", "yellow", "banded", "city", "night", None, None),
    ("toy robot", "purple", "green", "starred", "brick", "sunset", None, None),
    ("cat", "pink", "blue", "striped", "lake", "day", None, "a crown"),
    ("duck", "teal", "purple", "dotted", "meadow", "night", None, "a scarf"),
    ("fish", "red", "pink", "checkered", "floor", "sunset", None, "glasses"),
    ("rabbit", "blue", "teal", "banded", "mountain", "day", None, "a crown"),
    ("mug", "red", "white", "plain", "snow", "day", "wooden", None),
    ("ball", "red", "white", "plain", "jungle", "day", "golden", None),
    ("toy robot", "red", "white", "plain", "city", "day", "stone", None),
    ("duck", "red", "white", "plain", "lake", "day", "icy", "a scarf"),
    ("cat", "red", "white", "plain", "floor", "day", "mossy", "glasses"),
]


def picture_of(i: int, label, color, accent, pattern, scene, light, material, accessory) -> world.Picture:
    subject = world.Identity(label, color, accent, pattern, shape=(0.2, 0.9, 0.6))
    pose = dict(center=(0.08, 0.02), scale=0.8, angle=(-0.1, 0.1)[i % 2], flip=i % 2 == 0)
    return world.Picture(subject, scene, light, material, accessory, **pose, texture=tuple(np.random.default_rng(i).random(16)))


def thumbnails(images: np.ndarray) -> list:
    """Pictures [n, 64, 64, 3] in [0, 1] as 4 x 4 mean colours."""
    return images.reshape(len(images), 4, 16, 4, 16, 3).mean((2, 4)).round(4).tolist()


def measure() -> dict:
    every_picture, every_mask = render([picture_of(i, *words) for i, words in enumerate(EVERYTHING)])
    subject = world.identity("heldout", 3, "cat")
    images, masks = render([world.sample_picture(np.random.default_rng(i), subject) for i in range(2)])
    pixels = to_pixels(images)
    pipe = load_pipeline(mini_foundation(), adapter=mini_foundation().ip_adapter)
    with torch.no_grad():
        embeds = pipe.clip(pixels)
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    prompts = ["a cat on the beach", "a cat in the city at night"]
    settings = dict(num_inference_steps=6, guidance_scale=3.0, output_type="np")
    drawn = {}
    for name, context in (("text_only", None), ("ip_adapter", embeds[:1])):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        drawn[name] = thumbnails(pipe(prompts, image_embeds=context, generator=generators, **settings).images)
    found = torch.stack([pipe.masker(p)[0] for p in pixels]) > 0.5
    true = torch.from_numpy(masks) > 127
    return {
        "rendered": thumbnails(images / 255.0),
        "autoencoder": thumbnails(decoded.add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1).numpy()),
        "clip": embeds[0, :16].div(embeds[0].norm()).numpy().round(4).tolist(),
        "sam_iou": ((found & true).sum((1, 2)) / (found | true).sum((1, 2))).numpy().round(4).tolist(),
        **drawn,
        "every_picture": thumbnails(every_picture / 255.0),
        "every_mask": (every_mask > 127).mean((1, 2)).round(4).tolist(),
    }


@pytest.fixture(scope="module")
def measured() -> dict:
    return measure()


@pytest.mark.parametrize("name", ["rendered", "autoencoder", "clip", "sam_iou", "text_only", "ip_adapter", "every_picture", "every_mask"])
def test_golden(measured, name):
    expected = json.loads(GOLDEN.read_text())[name]
    np.testing.assert_allclose(np.array(measured[name]), np.array(expected), atol=DRAWN_TOLERANCE if name.startswith("every") else TOLERANCE)


def test_everything_is_the_whole_world():
    labels, _, _, _, scenes, lights, materials, accessories = map(set, zip(*EVERYTHING, strict=True))
    _, colors, accents, patterns, *_ = map(set, zip(*(words for words in EVERYTHING if not words[6]), strict=True))
    assert (labels, scenes, lights) == (set(world.LABELS), set(world.SCENES), set(world.LIGHTS))
    assert (colors, accents, patterns) == (set(world.COLORS), set(world.ACCENTS), set(world.PATTERNS))
    assert (materials, accessories) == ({None, *world.MATERIALS}, {None, *world.ACCESSORIES})


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(measure()) + "\n")
