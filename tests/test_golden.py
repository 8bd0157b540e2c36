"""What the shipped mini models draw and say, against numbers kept in tests/golden/mini.json. A missing golden fails.

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


def thumbnails(images: np.ndarray) -> list:
    """Pictures [n, 64, 64, 3] in [0, 1] as 4 x 4 mean colours."""
    return images.reshape(len(images), 4, 16, 4, 16, 3).mean((2, 4)).round(4).tolist()


def measure() -> dict:
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
    }


@pytest.fixture(scope="module")
def measured() -> dict:
    return measure()


@pytest.mark.parametrize("name", ["rendered", "autoencoder", "clip", "sam_iou", "text_only", "ip_adapter"])
def test_golden(measured, name):
    expected = json.loads(GOLDEN.read_text())[name]
    np.testing.assert_allclose(np.array(measured[name]), np.array(expected), atol=TOLERANCE)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(measure()) + "\n")
