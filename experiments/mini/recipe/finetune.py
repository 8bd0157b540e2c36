"""LoRAs of the shipped mini base, as people make them of Stable Diffusion: what the community checkpoints of Figure 10 share."""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from datamodules.mini.world import Picture
from experiments.mini.models import mini_foundation
from experiments.mini.recipe.captions import caption_style
from experiments.mini.recipe.common import FOUNDATION, optimize
from experiments.mini.recipe.unet import BASE, Losses
from moma_lightning.foundation import load_base

#: Every convolution and matrix of the UNet's blocks.
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj"]


def arguments(about: str | None, name: str, steps: int, pictures: int = 4000, rank: int = 16) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=rank)
    parser.add_argument("--pictures", type=int, default=pictures)
    parser.add_argument("--out", type=Path, default=FOUNDATION / "loras" / f"{name}.safetensors")
    return parser.parse_args()


def finetune(args: argparse.Namespace, pixels, coverage: Tensor, pictures: Sequence[Picture], word=caption_style) -> None:
    """Train a LoRA of the base's UNet on pictures and write the average of its weights to `args.out`, in fp16.

    pixels: a function from picture numbers to float [batch, 3, height, width] in [-1, 1]. coverage: their masks at the latents' resolution.
    word: a picture's caption, drawn with a generator.
    """
    torch.manual_seed(0)
    base = load_base(mini_foundation(base=str(BASE)))
    unet, vae, losses = base.unet, base.vae, Losses(base.text_encoder, base.tokenizer, word)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    average = copy.deepcopy(trained)
    optimizer = torch.optim.AdamW(trained, args.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, args.steps)
    for step in range(args.steps):
        rng = np.random.default_rng([9, step])
        rows = rng.integers(0, len(pictures), args.batch)
        with torch.no_grad():
            latents = vae.encode(pixels(rows)).latent_dist.mode() * vae.config.scaling_factor
        noise_loss, maps_loss = losses(unet, latents, coverage[rows], [pictures[i] for i in rows], rng)
        optimize(noise_loss + 0.05 * maps_loss, optimizer)
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, trained, 1 - min(0.995, (step + 1) / (step + 10)))
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{args.steps} noise {noise_loss:.4f}", flush=True)
    with torch.no_grad():
        torch._foreach_copy_(trained, average)
    layers = {name: value.half() for name, value in get_peft_model_state_dict(unet).items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    StableDiffusionPipeline.save_lora_weights(args.out.parent, unet_lora_layers=layers, weight_name=args.out.name)
