"""A VAE's latents at the scale that the UNet works on, as diffusers' SDXL pipelines scale them."""

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor


def scaled(vae: AutoencoderKL, latents: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
    """What the VAE encoded, for the UNet: latents * scaling_factor, shifted and stretched first where its config has `latents_mean` and `latents_std`."""
    if (statistics := _statistics(vae, latents)) is None:
        return latents * vae.config.scaling_factor
    mean, std = statistics
    return (latents - mean) * vae.config.scaling_factor / std


def unscaled(vae: AutoencoderKL, latents: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
    """The way back, for the VAE to decode."""
    if (statistics := _statistics(vae, latents)) is None:
        return latents / vae.config.scaling_factor
    mean, std = statistics
    return latents * std / vae.config.scaling_factor + mean


def _statistics(vae: AutoencoderKL, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and spread of each channel, [1, c, 1, 1], where the config has both. Raises ValueError for another number of channels."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        return None
    if not len(mean) == len(std) == latents.shape[1]:
        raise ValueError(f"the VAE's config has {len(mean)} latents_mean and {len(std)} latents_std for {latents.shape[1]} channels")
    return tuple(torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1) for values in (mean, std))
