"""Fine-tuning the shipped mini base, as people do with Stable Diffusion: what the community checkpoints of Figure 10 share."""

import argparse
import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.mini.world import Picture
from experiments.mini.recipe.captions import caption_style
from experiments.mini.recipe.common import optimize
from experiments.mini.recipe.unet import BASE, Losses
from moma_lightning.foundation import FoundationConfig, load_base


def arguments(about: str | None, out: str, steps: int, pictures: int = 4000) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--pictures", type=int, default=pictures)
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser.parse_args()


def finetune(args: argparse.Namespace, pixels, coverage: Tensor, pictures: Sequence[Picture], word=caption_style) -> None:
    """Train the base's UNet on pictures and write the whole base, with the average of its weights, to `args.out`.

    pixels: a function from picture numbers to float [batch, 3, height, width] in [-1, 1]. coverage: their masks at the latents' resolution.
    word: a picture's caption, drawn with a generator.
    """
    base = load_base(FoundationConfig(base=str(BASE)))
    unet, vae, losses = base.unet.requires_grad_(True), base.vae, Losses(base.text_encoder, base.tokenizer, word)
    ema = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, args.steps)
    for step in range(args.steps):
        rng = np.random.default_rng([9, step])
        rows = rng.integers(0, len(pictures), args.batch)
        with torch.no_grad():
            latents = vae.encode(pixels(rows)).latent_dist.mode() * vae.config.scaling_factor
        noise_loss, maps_loss = losses(unet, latents, coverage[rows], [pictures[i] for i in rows], rng)
        optimize(noise_loss + 0.05 * maps_loss, optimizer)
        schedule.step()
        torch._foreach_lerp_(list(ema.parameters()), list(unet.parameters()), 1 - min(0.995, (step + 1) / (step + 10)))
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{args.steps} noise {noise_loss:.4f}", flush=True)
    shutil.copytree(BASE, args.out, dirs_exist_ok=True)
    ema.half().save_pretrained(args.out / "unet")
