"""`python -m experiments.true_size`: one stage-2 step of Stable Diffusion 1.5 at its own size, with random weights, in fp32 on the CPU.

What can be shown without weights or GPU: that the step runs at 512 pixels, what it takes, that its loss is finite, and that the
adapter's parameters, and no others, receive gradients. About 12 GB of memory and some minutes on one core.
"""

import resource
import time
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from jsonargparse import auto_cli
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from experiments.mini.recipe.captions import build_tokenizer
from moma_lightning.batch import TripletBatch
from moma_lightning.foundation import STABLE_DIFFUSION_SCHEDULE, Base, FoundationConfig, ImageEncoder, frozen
from moma_lightning.models.adapter import install_processors
from moma_lightning.modules.stage2 import Stage2
from moma_lightning.modules.stage2_parts import Stage2Config, build_adapter
from moma_lightning.optim import OptimizerConfig, configure
from moma_lightning.plan.stages import stage2_of
from moma_lightning.training.options import TrainingOptions

UNET: dict[str, Any] = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)  # diffusers' other defaults are SD 1.5's
VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512, scaling_factor=0.18215,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
TEXT: dict[str, Any] = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
VIT_H: dict[str, Any] = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14, projection_dim=1024)


def random_base() -> Base:
    """Stable Diffusion 1.5 with random weights; the mini world's tokenizer, whose vocabulary is a part of CLIP's size."""
    tokenizer, unet = build_tokenizer(), UNet2DConditionModel(**UNET)
    install_processors(unet)
    eos = tokenizer.eos_token_id
    text = CLIPTextModel(CLIPTextConfig(**TEXT, eos_token_id=eos, bos_token_id=tokenizer.bos_token_id, pad_token_id=eos))
    return Base(frozen(unet), frozen(AutoencoderKL(**VAE)), frozen(text), tokenizer, DDIMScheduler(**STABLE_DIFFUSION_SCHEDULE))


def random_batch(size: int) -> TripletBatch:
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1
    return TripletBatch(torch.rand(1, 3, size, size) * 2 - 1, mask, ["a cat on the beach"], ["cat"], ["0"])


def main(size: int = 512, checkpointing: bool = False) -> None:
    """Print the loss before and after one step, which parameters got gradients, time and peak memory.

    Args:
        size: Pixels.
        checkpointing: Recompute the UNet's activations in the backward pass.
    """
    torch.manual_seed(0)
    base, encoder = random_base(), ImageEncoder(CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_H)), CLIPImageProcessor())
    config = Stage2Config(context="image_encoder", context_dropout=0.0)
    adapter = build_adapter(base, FoundationConfig(ip_adapter=None), config, encoder.embed_dim)
    module = stage2_of(base, encoder, None, adapter, config, OptimizerConfig(), TrainingOptions())
    with torch.no_grad():
        for layer in module.adapter.subject.values():
            layer.lambda_.fill_(0.1)  # at its first value, 0, K' and V' have no gradient by construction
    if checkpointing:
        module.unet.train().enable_gradient_checkpointing()
    optimizer = configure(module.named_parameters(), OptimizerConfig(), 1)["optimizer"]
    batch, begun = random_batch(size), time.perf_counter()
    loss = module.sample_losses(batch, torch.Generator().manual_seed(0), drop=True)[0].mean()
    loss.backward()
    optimizer.step()
    told = time.perf_counter() - begun
    report(module)
    with torch.no_grad():
        after = module.sample_losses(batch, torch.Generator().manual_seed(0), drop=True)[0].mean()
    print(f"loss {loss.item():.6f}, after one AdamW step {after.item():.6f}; step {told:.0f} s on {torch.get_num_threads()} thread(s); "
          f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")  # fmt: skip


def report(module: Stage2) -> None:
    """Parameters by part: how many, how many are trained, how many have a finite gradient other than 0."""
    adapter = module.adapter
    frozen_parts = {"UNet": module.unet, "VAE": module.vae, "text encoder": module.text_encoder, "image encoder": module.image_encoder}
    trained_parts = {"projector": adapter.image_proj, "context side": adapter.context, "subject side": adapter.subject}
    for name, part in (frozen_parts | trained_parts).items():
        parameters = list(part.parameters())
        moved = [p for p in parameters if p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any()]
        trained = [p for p in parameters if p.requires_grad]
        print(f"{name:<14} {sum(p.numel() for p in parameters) / 1e6:8.2f} M; tensors: {len(parameters)}, trained {len(trained)}, with gradient {len(moved)}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
