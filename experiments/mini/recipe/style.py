"""A community checkpoint of the mini base: fine-tuned to another drawing style (pastel), as people do with Stable Diffusion (Figure 10).

Not shipped: `python -m experiments.mini.recipe.style` makes it in some minutes. Check: its pictures are pale, and MoMA's adapters, trained on the
base, still carry the subject over (`make report ARGS='--report.bases ["runs/mini/bases/pastel"]'`).
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from experiments.mini.recipe.common import optimize, rendered, to_pixels
from experiments.mini.recipe.unet import BASE, Losses
from moma_lightning.foundation import FoundationConfig, load_base


def pastel(pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Pale and soft; values stay in [-1, 1]."""
    return F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1) * 0.5 + 0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("runs/mini/bases/pastel"))
    args = parser.parse_args()
    images, masks, pictures = rendered(args.pictures)
    coverage = F.adaptive_avg_pool2d(torch.from_numpy(masks)[:, None] / 255, 8)
    base = load_base(FoundationConfig(base=str(BASE)))
    unet, vae, losses = base.unet.requires_grad_(True), base.vae, Losses(base.text_encoder, base.tokenizer)
    optimizer = torch.optim.AdamW(unet.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, args.steps)
    for step in range(args.steps):
        rng = np.random.default_rng([9, step])
        rows = rng.integers(0, len(images), args.batch)
        with torch.no_grad():
            latents = vae.encode(pastel(to_pixels(images[rows]))).latent_dist.mode() * vae.config.scaling_factor
        noise_loss, maps_loss = losses(unet, latents, coverage[rows], [pictures[i] for i in rows], rng)
        optimize(noise_loss + 0.05 * maps_loss, optimizer)
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{args.steps} noise {noise_loss:.4f}", flush=True)
    shutil.copytree(BASE, args.out, dirs_exist_ok=True)
    unet.half().save_pretrained(args.out / "unet")


if __name__ == "__main__":
    main()
