"""Mini SAM: masks from point and box prompts by Dice and cross-entropy. Check: IoU under the pipeline's own prompts."""

import argparse

import numpy as np
import torch
from jaxtyping import Float
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn import functional as F

from datamodules.mini.render import render
from experiments.mini.recipe.clip import augment
from experiments.mini.recipe.common import FOUNDATION, optimize, rendered, sample_world, to_pixels, training_steps
from moma_lightning.segmentation import SamConfig, SamMasker, build_sam, point_prompts, save_sam


def sample_points(masks: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Five points a picture: the centre or any point of the subject, then the corners, which half of the pictures leave out (-1)."""
    points, labels = point_prompts(*masks.shape[1:])
    points, labels = np.tile(points, (len(masks), 1, 1)), np.tile(labels, (len(masks), 1))
    for i, mask in enumerate(masks):
        y, x = (np.asarray(mask.shape) - 1) // 2
        if rng.random() < 0.6 or not mask[y, x]:
            rows, columns = np.nonzero(mask)
            pick = rng.integers(len(rows))
            points[i, 0] = columns[pick], rows[pick]
    labels[rng.random(len(masks)) < 0.5, 1:] = -1
    return torch.from_numpy(points), torch.from_numpy(labels)


def boxes_of(masks: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Corners x0, y0, x1, y1 of each subject's box, a pixel or so off."""
    boxes = [(x.min(), y.min(), x.max(), y.max()) for y, x in map(np.nonzero, masks)]
    return torch.from_numpy((np.asarray(boxes) + rng.normal(0, 1, (len(masks), 4))).astype(np.float32))


def predict(sam: Sam, pixels: Tensor, points, boxes) -> tuple[Float[Tensor, "batch 4 h w"], Float[Tensor, "batch 4"]]:
    """Mask logits and predicted IoU of a batch of pictures in [-1, 1].

    The decoder repeats one picture's embedding for its many prompts; with one prompt each for many pictures, the embeddings
    go in where the decoder adds the dense prompt.
    """
    embeddings = sam.image_encoder(sam.preprocess((pixels + 1) * 127.5))
    sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=None)
    return sam.mask_decoder.predict_masks(torch.zeros_like(embeddings[:1]), sam.prompt_encoder.get_dense_pe(), sparse, dense + embeddings)


def iou(predicted: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union over the last two dimensions of boolean masks."""
    return (predicted & masks).sum((-2, -1)) / (predicted | masks).sum((-2, -1)).clamp(min=1)


def loss(logits: Float[Tensor, "batch 4 h w"], quality: Float[Tensor, "batch 4"], masks: Float[Tensor, "batch 1 h w"]) -> Tensor:
    """Dice and cross-entropy of the single mask and of the best of the three candidates; the error of the predicted IoU."""
    truth = masks.expand_as(logits)
    probability = logits.sigmoid()
    dice = 1 - (2 * (probability * truth).sum((2, 3)) + 1) / (probability.sum((2, 3)) + truth.sum((2, 3)) + 1)
    each = dice + F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((2, 3))
    quality_error = F.mse_loss(quality, iou(logits.detach() > 0, truth > 0.5))
    return each[:, 0].mean() + each[:, 1:].min(1).values.mean() + quality_error


@torch.no_grad()
def check(sam: Sam) -> dict[str, float]:
    """IoU of `SamMasker`'s masks with the exact ones, on 128 pictures it has not seen."""
    images, masks = render(sample_world(10_000_000, 128))
    masker = SamMasker(sam)
    values = torch.stack([iou(masker(pixels) > 0.5, torch.from_numpy(mask)[None] > 0) for pixels, mask in zip(to_pixels(images), masks, strict=True)])
    sam.requires_grad_(True)
    return {"IoU": float(values.mean()), "worst tenth": float(values.quantile(0.1))}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--pictures", type=int, default=40000)
    args = parser.parse_args()
    torch.manual_seed(0)
    images, masks, _ = rendered(args.pictures)
    config = SamConfig()
    sam = build_sam(config).train()
    optimizer = torch.optim.AdamW(sam.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in training_steps("sam", args.steps, {"sam": sam}, optimizer, args.lr, every=100):
        rng = np.random.default_rng([4, step])
        rows = rng.integers(0, len(images), args.batch)
        truth = torch.from_numpy(masks[rows])[:, None].float() / 255
        boxes = boxes_of(masks[rows], rng) if rng.random() < 0.2 else None
        value = loss(*predict(sam, augment(to_pixels(images[rows]), truth, rng), sample_points(masks[rows], rng), boxes), truth)
        optimize(value, optimizer)
        if (step + 1) % 100 == 0:
            print(f"loss {value:.3f}", check(sam), flush=True)
    save_sam(sam, config, FOUNDATION / "sam")
    print(check(SamMasker.from_pretrained(FOUNDATION / "sam").sam))


if __name__ == "__main__":
    main()
