"""Mini DINO: a timm ViT taught by instance discrimination to tell subjects apart, whatever the scene and the pose.

A batch holds groups of subjects of one label and one colour, two views each in scenes of their own, so that what tells them
apart is pattern, accent and proportions. With `--positives picture` it learns without identities instead, as DINO does: a batch holds
any pictures, two crops of each, so that scenes count as much as subjects (a control, not shipped). Checks on subjects it has not
seen: retrieval of another view, among subjects of all labels and among subjects of one label and one colour, and the mean cosine of
same and different subjects.
"""

import argparse
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
from jaxtyping import Float
from timm.models import save_for_hf
from torch import Tensor
from torch.nn import functional as F

from datamodules.mini import world
from datamodules.mini.render import render
from experiments.mini.recipe.common import FOUNDATION, WORK, optimize, to_pixels, training_steps
from moma_lightning.files import write_beside

VIEWS = 4
TEMPERATURE = 0.1


def build() -> torch.nn.Module:
    return timm.create_model(
        "vit_small_patch16_224", img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=4, num_classes=0, global_pool="token",
        pretrained_cfg_overlay=dict(tag="mini", input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, interpolation="bicubic"))


def views_of(identities: list[world.Identity], count: int, seed: int) -> np.ndarray:
    """`count` pictures of each identity, every one in a scene and a pose of its own; uint8 [identities, count, 64, 64, 3]."""
    pictures = [world.sample_picture(np.random.default_rng([seed, i, k]), subject, accessory_rate=0.15)
                for i, subject in enumerate(identities) for k in range(count)]
    images = np.concatenate([render(pictures[i : i + 256])[0] for i in range(0, len(pictures), 256)])
    return images.reshape(len(identities), count, *images.shape[1:])


def training_views(count: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Views of `count` training identities, drawn once and kept in WORK; and the groups of one label and one colour."""
    identities = [world.identity("train", 1_000_000 + i) for i in range(count)]
    path = WORK / f"identities-{count}.npy"
    if not path.exists():
        write_beside(path, lambda p: np.save(p, views_of(identities, VIEWS, seed=21)))
    groups = defaultdict(list)
    for i, subject in enumerate(identities):
        groups[subject.label, subject.color].append(i)
    return np.load(path, mmap_mode="r"), [np.asarray(rows) for rows in groups.values()]


def sample_batch(images, groups, rng, group_count: int, group_size: int) -> Tensor:
    """Two views of `group_size` identities of each of `group_count` groups: pixels [2 * identities, 3, 64, 64], views apart."""
    chosen = rng.choice(len(groups), group_count, replace=False)
    rows = np.concatenate([rng.choice(groups[g], min(group_size, len(groups[g])), replace=False) for g in chosen])
    pairs = np.argsort(rng.random((len(rows), VIEWS)), axis=1)[:, :2]
    return to_pixels(np.concatenate([images[rows, pairs[:, 0]], images[rows, pairs[:, 1]]]))


def sample_crops(images, rng, count: int) -> Tensor:
    """Two random crops of each of `count` pictures: pixels [2 * count, 3, 64, 64], crops apart."""
    rows, views = rng.choice(len(images), count, replace=False), rng.integers(0, VIEWS, count)
    pixels = to_pixels(images[rows, views])
    return torch.stack([random_crop(picture, rng) for picture in torch.cat([pixels, pixels])])


def random_crop(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """A square of 60 to 100 % of the picture's side, mirrored half of the time, at its size."""
    size = picture.shape[-1]
    side = int(rng.integers(round(0.6 * size), size + 1))
    top, left = rng.integers(0, size - side + 1, 2)
    crop = F.interpolate(picture[None, :, top : top + side, left : left + side], (size, size), mode="bilinear", antialias=True)[0]
    return crop.flip(-1) if rng.random() < 0.5 else crop


def augment(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur, loss of detail, noise and shifts of colour, as a small autoencoder or a JPEG brings, so that these say nothing."""
    def uniform(low, high, channels=1):
        return torch.from_numpy(rng.uniform(low, high, (len(pixels), channels, 1, 1)).astype(np.float32))

    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    coarse = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2.0, mode="bilinear")
    pixels = torch.lerp(torch.lerp(pixels, blurred, uniform(0, 1)), coarse, uniform(0, 0.7))
    pixels = pixels * uniform(0.85, 1.1) + uniform(-0.06, 0.06, channels=3)
    return pixels + uniform(0, 0.08) * torch.from_numpy(rng.standard_normal(pixels.shape, np.float32))


def info_nce(features: Float[Tensor, "twice dim"]) -> Float[Tensor, ""]:
    """NT-Xent over 2n features whose rows i and i + n are two views of one subject: every other row is a negative."""
    n = len(features) // 2
    features = F.normalize(features, dim=-1)
    logits = (features @ features.T / TEMPERATURE).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(2 * n).roll(n))


@torch.no_grad()
def embed(model, images: np.ndarray) -> Tensor:
    return F.normalize(torch.cat([model(to_pixels(images[i : i + 200])) for i in range(0, len(images), 200)]), dim=-1)


def retrieval(query: Tensor, gallery: Tensor) -> dict[str, float]:
    """R@1 of each query's own row in the gallery, and mean cosines with it and with the others."""
    cosine = query @ gallery.T
    same, n = cosine.diagonal(), len(cosine)
    return {"R@1": float((cosine.argmax(1) == torch.arange(n)).float().mean()), "same": float(same.mean()),
            "other": float((cosine.sum() - same.sum()) / (n * n - n))}


@cache
def held_out_views() -> tuple[np.ndarray, np.ndarray]:
    """Two views each of 200 held-out subjects of all labels, and of 20 x 10 subjects that share a label and a colour."""
    everyone = [world.identity("heldout", i) for i in range(200)]
    alike = [look_alike(pair, i) for pair in range(20) for i in range(10)]
    return views_of(everyone, 2, seed=22), views_of(alike, 2, seed=23)


def check(model) -> dict[str, dict[str, float]]:
    """Retrieval of a second view among 200 subjects, and among 10 of one label and colour (mean over 20 such tens)."""
    everyone, alike = ([embed(model, views[:, k]) for k in range(2)] for views in held_out_views())
    tens = [retrieval(*pair) for pair in zip(*(view.split(10) for view in alike), strict=True)]
    return {"all labels": retrieval(*everyone),
            "same label and colour": {key: float(np.mean([r[key] for r in tens])) for key in tens[0]}}


def look_alike(pair: int, index: int) -> world.Identity:
    """Held-out subject number `index` of the pair's label and colour."""
    label, color = world.LABELS[pair % len(world.LABELS)], tuple(world.COLORS)[pair % len(world.COLORS)]
    found = (s for i in range(10**6) if (s := world.identity("heldout", 5000 + i, label)).color == color)
    return next(s for i, s in enumerate(found) if i == index)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--identities", type=int, default=6000)
    parser.add_argument("--positives", choices=("subject", "picture"), default="subject")
    parser.add_argument("--out", type=Path, default=FOUNDATION / "dino")
    args = parser.parse_args()
    torch.manual_seed(0)
    images, groups = training_views(args.identities)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    name = "dino" if args.positives == "subject" else "dino-picture"
    for step in training_steps(name, args.steps, {"model": model}, optimizer, args.lr, every=200):
        rng = np.random.default_rng([3, step])
        if args.positives == "subject":
            pixels = sample_batch(images, groups, rng, args.groups, args.group_size)
        else:
            pixels = sample_crops(images, rng, args.groups * args.group_size)
        value = info_nce(model(augment(pixels, rng)))
        optimize(value, optimizer)
        if (step + 1) % 200 == 0:
            print(f"loss {value:.3f}", check(model.eval()), flush=True)
            model.train()
    save_for_hf(model.eval(), args.out, safe_serialization=True)
    print(check(timm.create_model(f"local-dir:{args.out}", pretrained=True).eval()))


if __name__ == "__main__":
    main()
