"""A community checkpoint of the mini base: a LoRA of another drawing style (pastel), as people make them of Stable Diffusion (Figure 10).

Check: its pictures are pale, and MoMA's adapters, trained on the base, still carry the subject over:
`make ablate AXIS=experiments/mini/ablations/community.yaml`.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from experiments.mini.recipe.common import rendered, to_pixels
from experiments.mini.recipe.finetune import arguments, finetune


def pastel(pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Pale and soft; values stay in [-1, 1]."""
    return F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1) * 0.5 + 0.5


def main():
    args = arguments(__doc__, "pastel", steps=400)
    images, masks, pictures = rendered(args.pictures)
    coverage = F.adaptive_avg_pool2d(torch.from_numpy(masks)[:, None] / 255, 8)
    finetune(args, lambda rows: pastel(to_pixels(images[rows])), coverage, pictures)


if __name__ == "__main__":
    main()
