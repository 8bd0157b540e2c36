"""Mini AutoencoderKL (f = 8, 16 channels): L1 + gradient L1 + a light KL. Check: PSNR on pictures it has not seen."""

import argparse

import numpy as np
import torch
from diffusers import AutoencoderKL

from datamodules.mini.render import render
from experiments.mini.recipe.common import FOUNDATION, optimize, psnr, rendered, sample_world, to_pixels, training_steps


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 48, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )


def gradients(x):
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def loss(vae, pixels, masks):
    """Reconstruction, twice as heavy on the subject, plus the latents' KL to a unit Gaussian."""
    posterior = vae.encode(pixels).latent_dist
    output = vae.decode(posterior.sample()).sample
    weight = 1 + masks
    reconstruction = (weight * (output - pixels).abs()).mean()
    edges = sum((a - b).abs().mean() for a, b in zip(gradients(output), gradients(pixels), strict=True))
    return reconstruction + edges + 1e-5 * posterior.kl().mean() / 16, output


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--pictures", type=int, default=40000)
    args = parser.parse_args()
    torch.manual_seed(0)
    images, masks, _ = rendered(args.pictures)
    vae = build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    held_out = to_pixels(render(sample_world(10_000_000, 128))[0])
    for step in training_steps("autoencoder", args.steps, {"vae": vae}, optimizer, args.lr, every=500):
        rows = np.random.default_rng([1, step]).integers(0, len(images), args.batch)
        pixels = to_pixels(images[rows]).contiguous(memory_format=torch.channels_last)
        value, _ = loss(vae, pixels, torch.from_numpy(masks[rows])[:, None] / 255)
        optimize(value, optimizer)
        if (step + 1) % 500 == 0:
            with torch.no_grad():
                output = vae.decode(vae.encode(held_out).latent_dist.mode()).sample
            print(f"loss {value:.4f}, held-out PSNR {psnr(output.clamp(-1, 1), held_out):.2f} dB", flush=True)
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_pixels(images[i : i + 256])).latent_dist.sample() for i in range(0, 2048, 256)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    vae.save_pretrained(FOUNDATION / "base" / "vae", safe_serialization=True)


if __name__ == "__main__":
    main()
