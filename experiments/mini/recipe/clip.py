"""Mini CLIP: both towers by the symmetric contrastive loss. Checks: zero-shot category, scene and colour, retrieval."""

import argparse

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPVisionModelWithProjection

from datamodules.mini import world
from datamodules.mini.render import render
from experiments.mini.recipe.captions import MAX_TOKENS, build_tokenizer, caption_style
from experiments.mini.recipe.common import FOUNDATION, optimize, rendered, sample_world, to_pixels, training_steps

WIDTH = 128


def build(tokenizer) -> CLIPModel:
    eos = tokenizer.eos_token_id
    text = dict(vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3, num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS, projection_dim=WIDTH, bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=eos)
    vision = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8,
                  projection_dim=WIDTH)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def image_processor() -> CLIPImageProcessor:
    """Picture in [0, 255] to [-1, 1] at 64 pixels."""
    return CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def augment(pixels: torch.Tensor, masks: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Some subjects on white (what the MLLM sees), and mild noise and blur, so that generated pictures are not foreign."""
    white = torch.from_numpy(rng.random(len(pixels)) < 0.05)[:, None, None, None]
    pixels = torch.where(white & (masks < 0.5), torch.ones(()), pixels)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mix = torch.from_numpy(rng.random((len(pixels), 1, 1, 1))).float() * 0.8
    return torch.lerp(pixels, blurred, mix) + 0.05 * torch.from_numpy(rng.standard_normal(pixels.shape, np.float32))


def contrastive_loss(model, image_embeds, text_embeds, captions):
    """CLIP's loss; pairs with equal captions are all positives."""
    logits = model.logit_scale.exp().clamp(max=50) * F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T
    ids = torch.from_numpy(np.unique(captions, return_inverse=True)[1])
    positives = (ids[:, None] == ids[None]).float()
    positives = positives / positives.sum(1, keepdim=True)
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2


@torch.no_grad()
def zero_shot(model, tokenizer) -> dict[str, float]:
    pictures = sample_world(10_000_000, 500, material_rate=0, accessory_rate=0)
    image = F.normalize(model.get_image_features(to_pixels(render(pictures)[0])).pooler_output, dim=-1)

    def accuracy(prompts, truth):
        tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        return float(((image @ text.T).argmax(1) == torch.tensor(truth)).float().mean())

    labels, scenes, colors = world.LABELS, tuple(world.SCENES), tuple(world.COLORS)
    return {
        "category": accuracy([f"a photo of a {w}" for w in labels], [labels.index(p.identity.label) for p in pictures]),
        "scene": accuracy([f"a photo {world.SCENES[w]}" for w in scenes], [scenes.index(p.scene) for p in pictures]),
        "color": accuracy([f"a {w} toy" for w in colors], [colors.index(p.identity.color) for p in pictures]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--pictures", type=int, default=40000)
    args = parser.parse_args()
    torch.manual_seed(0)
    images, masks, pictures = rendered(args.pictures)
    tokenizer = build_tokenizer()
    model = build(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    for step in training_steps("clip", args.steps, {"clip": model}, optimizer, args.lr, every=50):
        rng = np.random.default_rng([2, step])
        rows = rng.integers(0, len(images), args.batch)
        captions = [caption_style(pictures[i], rng) for i in rows]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        pixels = augment(to_pixels(images[rows]), torch.from_numpy(masks[rows])[:, None] / 255, rng)
        image_embeds, text_embeds = model.get_image_features(pixels).pooler_output, model.get_text_features(**tokens).pooler_output
        value = contrastive_loss(model, image_embeds, text_embeds, captions)
        optimize(value, optimizer)
        if (step + 1) % 50 == 0:
            print(f"loss {value:.3f}", zero_shot(model.eval(), tokenizer), flush=True)
            model.train()
    save(model.eval(), tokenizer)


def save(model, tokenizer):
    """`clip` whole; its text tower as the base's text encoder; its vision tower as IP-Adapter's image encoder."""
    base = FOUNDATION / "base"
    model.save_pretrained(FOUNDATION / "clip")
    for folder in (FOUNDATION / "clip", base / "tokenizer"):
        tokenizer.save_pretrained(folder)
    for folder in (FOUNDATION / "clip", FOUNDATION / "image_encoder"):
        image_processor().save_pretrained(folder)
    tower(CLIPTextModel, model.config.text_config, model).save_pretrained(base / "text_encoder")
    tower(CLIPVisionModelWithProjection, model.config.vision_config, model).save_pretrained(FOUNDATION / "image_encoder")


def tower(cls, config, model):
    """One of CLIP's towers as a model of its own, with every weight found."""
    part = cls(config)
    prefix = "" if set(part.state_dict()) <= set(model.state_dict()) else "text_model."
    part.load_state_dict({key: model.state_dict()[prefix + key] for key in part.state_dict()})
    return part


if __name__ == "__main__":
    main()
