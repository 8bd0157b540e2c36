"""A community checkpoint of the mini base that also knows poses and camera distances (Figure 10, upper panel).

The shipped base never saw a subject upside down or far away. This trains a LoRA of its UNet on pictures of which two thirds are so; the text encoder is left
alone, and so are MoMA's adapters, which only ever saw upright subjects. Check: the commands in experiments/mini/views.yaml, then
`python -m experiments.mini.recipe.check_views`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from datamodules.mini import world
from datamodules.mini.render import render
from datamodules.mini.views import VIEWS, say, seen
from experiments.mini.recipe.common import sample_world, to_pixels
from experiments.mini.recipe.finetune import arguments, finetune


@dataclass(frozen=True)
class ViewedPicture(world.Picture):
    """words: of its view, empty for an ordinary one."""

    words: str = ""


def viewed(count: int) -> list[ViewedPicture]:
    """Training-split pictures, two of three in a view."""
    pictures = []
    for index, picture in enumerate(sample_world(40_000_000, count, accessory_rate=0.0)):
        words = str(np.random.default_rng([15, index]).choice([*VIEWS])) if index % 3 else ""
        pictures.append(ViewedPicture(**vars(seen(picture, words) if words else picture), words=words))
    return pictures


def caption(picture: ViewedPicture, rng: np.random.Generator) -> str:
    """The full caption or the filtered one, and the view's words. No prefixes: words unknown to the tokenizer are long, and there are 24 tokens."""
    full = world.caption(picture)
    text = full if rng.random() < 0.7 else world.filter_caption(full)
    return say(picture.words, text, picture.identity.label) if picture.words else text


def main():
    args = arguments(__doc__, "views", steps=2400, pictures=12000)
    pictures = viewed(args.pictures)
    images, masks = (np.concatenate(parts) for parts in zip(*(render(pictures[i : i + 256]) for i in range(0, len(pictures), 256)), strict=True))
    coverage = F.adaptive_avg_pool2d(torch.from_numpy(masks)[:, None] / 255, 8)
    finetune(args, lambda rows: to_pixels(images[rows]), coverage, pictures, caption)


if __name__ == "__main__":
    main()
