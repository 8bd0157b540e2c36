"""What MoMA's attention costs a denoising step: median times on Stable Diffusion 1.5's layout with random weights.

`python -m experiments.bench --width 1 --latents 64` is full size (512 px); the defaults are a quarter of its width on 256 px.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

from moma_lightning.models.adapter import MoMAAdapter, install_processors
from moma_lightning.models.attention import Conditioning, Recorder
from moma_lightning.models.masks import MaskPyramid

TEXT = 77


def build_unet(width: float, device: torch.device) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's UNet with its channels times `width`."""
    channels = tuple(int(c * width) for c in (320, 640, 1280, 1280))
    return UNet2DConditionModel(block_out_channels=channels, cross_attention_dim=768, attention_head_dim=8, norm_num_groups=16).to(device).eval()


def conditionings(unet: UNet2DConditionModel, text: torch.Tensor, latents: torch.Tensor, share: float) -> dict[str, Callable[[], Conditioning]]:
    """The parts of MoMA, one more at a time; subject and generated mask cover `share` of the picture."""
    adapter = MoMAAdapter.for_unet(unet, image_embed_dim=1024).to(latents.device).eval()
    context = adapter.context_conditioning(torch.randn(2, 1024, device=latents.device))
    size = latents.shape[-1]
    mask = torch.zeros(1, 1, size, size, device=latents.device)
    mask[..., : round(size * share**0.5), : round(size * share**0.5)] = 1
    pyramid = MaskPyramid(mask, (size, size))
    features = adapter.reference_features(unet, latents[:1], text[:1])
    subject = adapter.subject_conditioning(features, pyramid, MaskPyramid(mask.expand(2, -1, -1, -1), (size, size)))
    label_tokens = torch.zeros(1, TEXT, device=latents.device)
    label_tokens[:, 4] = 1
    return {
        "its processors, nothing to do": lambda: Conditioning(),
        "+ context attention": lambda: Conditioning(context=context),
        f"+ subject attention, mask {share:.0%}": lambda: Conditioning(subject, context),
        "+ the label's attention map": lambda: Conditioning(subject, context, Recorder(label_tokens=label_tokens)),
    }


def median_seconds(step: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median over `repeats` after one step that does not count."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--mask", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    unet = build_unet(args.width, device)
    latents, text = torch.randn(2, 4, args.latents, args.latents, device=device), torch.randn(2, TEXT, 768, device=device)
    unet.set_attn_processor(AttnProcessor2_0())
    stock = median_seconds(lambda: unet(latents, 500, text), args.repeats, device)
    print(f"guided step, {args.latents}x{args.latents} latents, width x{args.width:g}, {device}, {torch.get_num_threads()} threads")
    print(f"{'stock diffusers':<36} {stock * 1000:8.1f} ms")
    install_processors(unet)
    for name, conditioning in conditionings(unet, text, latents, args.mask).items():
        seconds = median_seconds(lambda: unet(latents, 500, text, cross_attention_kwargs={"conditioning": conditioning()}), args.repeats, device)
        print(f"{name:<36} {seconds * 1000:8.1f} ms  {seconds / stock:5.2f} x")


if __name__ == "__main__":
    main()
