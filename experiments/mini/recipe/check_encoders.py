"""The shipped CLIP and autoencoder on unseen pictures: zero-shot accuracy, caption retrieval, PSNR, and originals over reconstructions.

`python -m experiments.mini.recipe.check_encoders [picture.png]`
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from datamodules.mini import world
from datamodules.mini.render import render
from experiments.mini.recipe.clip import zero_shot
from experiments.mini.recipe.common import FOUNDATION, psnr, sample_world, to_pixels
from moma_lightning.files import write_beside

FIRST = 10_100_000


@torch.no_grad()
def caption_retrieval(model: CLIPModel, tokenizer: CLIPTokenizer, count: int = 256) -> dict[str, float]:
    """R@1 of a picture's caption among `count` and the other way round; an equal caption is as good."""
    pictures = sample_world(FIRST, count)
    captions = [world.caption(picture) for picture in pictures]
    image = F.normalize(model.get_image_features(to_pixels(render(pictures)[0])).pooler_output, dim=-1)
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    cosine = image @ F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1).T

    def found(best: torch.Tensor) -> float:
        return sum(captions[i] == captions[j] for i, j in enumerate(best.tolist())) / count

    return {"picture to caption": found(cosine.argmax(1)), "caption to picture": found(cosine.argmax(0))}


@torch.no_grad()
def reconstructions(vae: AutoencoderKL, count: int = 128) -> tuple[float, Image.Image]:
    """Mean PSNR in dB, and the first eight pictures over what the autoencoder makes of them."""
    pixels = to_pixels(render(sample_world(FIRST, count))[0])
    made = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    rows = torch.cat([torch.cat(list(part[:8]), dim=2) for part in (pixels, made)], dim=1)
    picture = Image.fromarray(rows.permute(1, 2, 0).add(1).mul(127.5).round().byte().numpy())
    return psnr(pixels, made), picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.BICUBIC)


def main():
    model, tokenizer = CLIPModel.from_pretrained(FOUNDATION / "clip").eval(), CLIPTokenizer.from_pretrained(FOUNDATION / "clip")
    value, picture = reconstructions(AutoencoderKL.from_pretrained(FOUNDATION / "base" / "vae", torch_dtype=torch.float32).eval())
    print("zero-shot", zero_shot(model, tokenizer), "retrieval", caption_retrieval(model, tokenizer), f"PSNR {value:.1f} dB")
    if len(sys.argv) > 1:
        write_beside(Path(sys.argv[1]), picture.save)


if __name__ == "__main__":
    main()
