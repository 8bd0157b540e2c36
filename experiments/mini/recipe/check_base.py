"""Gate of the text-to-image base: zero-shot category and scene of text-only samples against real pictures, and M_gen's IoU.

Writes a grid of samples (a row a label, a column a scene) to WORK/base.png.
"""

import argparse

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from datamodules.mini import world
from datamodules.mini.render import render
from experiments.mini.models import mini_foundation
from experiments.mini.recipe.common import FOUNDATION, WORK, sample_world, to_pixels
from experiments.mini.recipe.unet import scheduler
from moma_lightning.foundation import load_base
from moma_lightning.models.attention import Conditioning, Recorder
from moma_lightning.models.mask_estimation import estimate_mask
from moma_lightning.picture_grid import picture_grid
from moma_lightning.pipeline import MoMAPipeline
from moma_lightning.subject import label_tokens


@torch.no_grad()
def classify(pixels: torch.Tensor, prompts: list[str]) -> np.ndarray:
    clip, tokenizer = CLIPModel.from_pretrained(FOUNDATION / "clip"), CLIPTokenizer.from_pretrained(FOUNDATION / "clip")
    image = F.normalize(clip.get_image_features(pixels).pooler_output, dim=-1)
    text = clip.get_text_features(**tokenizer(prompts, padding="max_length", return_tensors="pt")).pooler_output
    return (image @ F.normalize(text, dim=-1).T).argmax(1).numpy()


def accuracies(pixels: torch.Tensor, labels: list[str], scenes: list[str]) -> dict[str, float]:
    all_scenes = list(world.SCENES)
    category = classify(pixels, [f"a photo of a {w}" for w in world.LABELS]) == [world.LABELS.index(w) for w in labels]
    scene = classify(pixels, [f"a photo {world.SCENES[w]}" for w in all_scenes]) == [all_scenes.index(w) for w in scenes]
    return {"category": round(float(category.mean()), 3), "scene": round(float(scene.mean()), 3)}


@torch.no_grad()
def map_iou(pipe: MoMAPipeline, timestep: int, count: int = 64) -> float:
    """IoU of M_gen > 0.5 with the true mask, from real pictures noised to `timestep`."""
    pictures = sample_world(20_000_000, count, material_rate=0, accessory_rate=0)
    images, masks = render(pictures)
    latents = pipe.vae.encode(to_pixels(images)).latent_dist.mode() * pipe.vae.config.scaling_factor
    noisy = scheduler().add_noise(latents, torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([timestep]))
    captions = [world.filter_caption(world.caption(p)) for p in pictures]
    tokens = torch.cat([label_tokens(pipe.tokenizers, [c], p.identity.label) for c, p in zip(captions, pictures, strict=True)])
    recorder = Recorder(label_tokens=tokens)
    text, _ = pipe.encode_prompt(captions, "cpu", 1, False)
    pipe.unet(noisy, timestep, text, cross_attention_kwargs={"conditioning": Conditioning(recorder=recorder)})
    mask = estimate_mask(recorder.label_maps, latents.shape[-2:]) > 0.5
    true = F.adaptive_avg_pool2d(torch.from_numpy(masks)[:, None] / 255, 8) > 0.5
    return round(float(((mask & true).sum((1, 2, 3)) / (mask | true).sum((1, 2, 3))).mean()), 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=3.0)
    args = parser.parse_args()
    pipe = MoMAPipeline.from_base(load_base(mini_foundation()))
    cells = [(label, scene) for label in world.LABELS for scene in world.SCENES] * args.seeds
    rows = []
    for start in range(0, len(cells), 20):
        prompts = [f"a {label} {world.SCENES[scene]}" for label, scene in cells[start : start + 20]]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(prompts))]
        rows += pipe(prompts, guidance_scale=args.guidance, num_inference_steps=16, generator=generators).images
    WORK.mkdir(parents=True, exist_ok=True)
    picture_grid([rows[i : i + 10] for i in range(0, 100, 10)]).resize((1320, 1320), 0).save(WORK / "base.png")
    pixels = to_pixels(np.stack([np.asarray(r) for r in rows]))
    real = sample_world(30_000_000, 300, material_rate=0, accessory_rate=0)
    print("text-only samples", accuracies(pixels, *map(list, zip(*cells, strict=True))))
    print("real pictures    ", accuracies(to_pixels(render(real)[0]), [p.identity.label for p in real], [p.scene for p in real]))
    print("M_gen IoU", {t: map_iou(pipe, t) for t in (900, 700, 500, 300, 100)})


if __name__ == "__main__":
    main()
