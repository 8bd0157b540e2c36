"""Mini text-to-image base: UNet2DConditionModel on the mini autoencoder's latents, SD 1.5's noise schedule and epsilon loss.

Departures from Stable Diffusion's training, each because the model is tiny and hours are few: min-SNR-5 loss weights,
subject positions weigh 1 + 3 x mask, and a Dice loss that makes the label's cross-attention maps cover the subject (in
large models they do so by themselves; M_gen needs it). Run on two one-thread processes:
`OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m experiments.mini.recipe.unet`, then a second round with `--second-round --steps 9000 --lr 1e-3`,
which starts from the first one's average. Check: `python -m experiments.mini.recipe.check_base`.
"""

import argparse
import copy

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPTextModel, CLIPTokenizer

from experiments.mini.recipe.captions import caption_style
from experiments.mini.recipe.common import FOUNDATION, WORK, optimize, rendered, to_pixels, training_steps
from moma_lightning.files import write_beside
from moma_lightning.foundation import STABLE_DIFFUSION_SCHEDULE
from moma_lightning.losses import min_snr_weight
from moma_lightning.models.adapter import install_processors
from moma_lightning.models.attention import Conditioning, Recorder
from moma_lightning.models.mask_estimation import average_maps, find_label_tokens

BASE = FOUNDATION / "base"


def build() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=16, out_channels=16, layers_per_block=1, block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's schedule."""
    return DDIMScheduler(**STABLE_DIFFUSION_SCHEDULE)


@torch.no_grad()
def encoded(count: int) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Latents (scaled, fp16), masks at 8 x 8 and descriptions of `count` pictures, encoded once and kept in WORK."""
    images, masks, pictures = rendered(count)
    path = WORK / f"latents-{count}.pt"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(BASE / "vae", torch_dtype=torch.float32).eval()
        chunks = [vae.encode(to_pixels(images[i : i + 250])).latent_dist.mode() * vae.config.scaling_factor for i in range(0, count, 250)]
        write_beside(path, lambda p: torch.save(torch.cat(chunks).half(), p))
    coverage = F.adaptive_avg_pool2d(torch.from_numpy(masks)[:, None] / 255, 8)
    return torch.load(path, weights_only=True), coverage, pictures


class Losses:
    """Noise prediction and label-map coverage of one batch. word: a picture's caption, drawn with a generator."""

    def __init__(self, text_encoder, tokenizer, word=caption_style):
        self.text_encoder, self.tokenizer, self.word, self.schedule = text_encoder, tokenizer, word, scheduler()

    def __call__(self, unet, latents, masks, pictures, rng) -> tuple[torch.Tensor, torch.Tensor]:
        captions = [self.word(p, rng) for p in pictures]
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        labels = torch.cat([
            find_label_tokens(ids[i : i + 1], [self.tokenizer(p.identity.label, add_special_tokens=False).input_ids], captions[i:], p.identity.label)
            for i, p in enumerate(pictures)
        ])
        dropped = torch.from_numpy(rng.random(len(pictures)) < 0.1)
        ids[dropped] = self.tokenizer("", padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            text = self.text_encoder(ids).last_hidden_state
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
        recorder = Recorder(label_tokens=labels)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, text, cross_attention_kwargs={"conditioning": Conditioning(recorder=recorder)}).sample
        alphas = self.schedule.alphas_cumprod[timesteps]
        weight = min_snr_weight(alphas, gamma=5.0)[:, None, None, None] * (1 + 3 * masks)
        maps = average_maps(recorder.label_maps, latents.shape[-2:])
        dice = 1 - 2 * (maps * masks).sum((1, 2, 3)) / (maps + masks).sum((1, 2, 3)).clamp(min=1e-6)
        coverage = (dice * alphas.sqrt() * ~dropped).mean()
        return (weight * (prediction - noise).square()).mean(), coverage


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--batch", type=int, default=24, help="per process")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--pictures", type=int, default=40000)
    parser.add_argument("--second-round", action="store_true", help="go on from the weights in the foundation's folder, with the schedule anew")
    args = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        encoded(args.pictures)
    dist.barrier()
    latents, masks, pictures = encoded(args.pictures)
    torch.manual_seed(0)
    unet = build().to(memory_format=torch.channels_last)
    if args.second_round:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(BASE / "unet", torch_dtype=torch.float32).state_dict())
    install_processors(unet)
    ema = copy.deepcopy(unet).requires_grad_(False)
    losses = Losses(CLIPTextModel.from_pretrained(BASE / "text_encoder").eval(), CLIPTokenizer.from_pretrained(BASE / "tokenizer"))
    optimizer = torch.optim.AdamW(unet.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parallel = DistributedDataParallel(unet)
    name = "unet-second" if args.second_round else "unet"
    steps = training_steps(name, args.steps, {"unet": unet, "ema": ema}, optimizer, args.lr, every=500, save=rank == 0)
    for step in steps:
        # Other draws than the first round's.
        rng = np.random.default_rng([13 if args.second_round else 3, step, rank])
        torch.manual_seed((step + 1_000_000 * args.second_round) * world_size + rank)
        rows = rng.integers(0, len(latents), args.batch)
        batch = latents[rows].float().contiguous(memory_format=torch.channels_last)
        noise_loss, coverage = losses(parallel, batch, masks[rows], [pictures[i] for i in rows], rng)
        optimize(noise_loss + 0.05 * coverage, optimizer)
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(unet.parameters()), 1 - decay)
        if rank == 0 and (step + 1) % 100 == 0:
            print(f"step {step + 1} noise {noise_loss:.4f} dice {coverage:.3f}", flush=True)
        if rank == 0 and ((step + 1) % 500 == 0 or step + 1 == args.steps):
            export(ema)
    dist.destroy_process_group()


def export(unet) -> None:
    """The EMA as fp16 safetensors in the base folder; it is what is shipped. With it the folder is a whole pipeline's."""
    copy.deepcopy(unet).half().save_pretrained(BASE / "unet")
    scheduler().save_pretrained(BASE / "scheduler")
    vae, text_encoder = AutoencoderKL.from_pretrained(BASE / "vae"), CLIPTextModel.from_pretrained(BASE / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    pipe = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler(), None, None, requires_safety_checker=False)
    pipe.save_config(BASE)


if __name__ == "__main__":
    main()
