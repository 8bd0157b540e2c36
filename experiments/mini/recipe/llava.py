"""Mini LLaVA: the mini CLIP's vision tower and a small Llama, taught to caption. Check: words of captions on unseen pictures."""

import argparse

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from datamodules.mini import world
from datamodules.mini.render import render
from experiments.mini.recipe.captions import corpus
from experiments.mini.recipe.clip import image_processor
from experiments.mini.recipe.common import FOUNDATION, optimize, rendered, sample_world, to_pixels, training_steps

PROMPT = "USER: <image>\nDescribe. ASSISTANT:"
WIDTH = 128
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama's special tokens, in which every word of the mini world is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, special_tokens=list(SPECIAL.values()),
                                  show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator([*corpus(), "\nan", "\ndescribe."], trainer)
    bos = SPECIAL["bos_token"], tokenizer.token_to_id(SPECIAL["bos_token"])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    special = dict(SPECIAL)
    extra = {"image_token": special.pop("image_token")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=extra, **special)


def build_processor() -> LlavaProcessor:
    return LlavaProcessor(image_processor=image_processor(), tokenizer=build_tokenizer(), patch_size=8,
                          num_additional_image_tokens=1, vision_feature_select_strategy="default")


def build(tokenizer, vision: CLIPVisionConfig) -> LlavaForConditionalGeneration:
    """About 1.6 M parameters: half vision tower, half Llama. Random weights."""
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=4,
                       num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
                       bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                       pad_token_id=tokenizer.pad_token_id)
    image_token = tokenizer.convert_tokens_to_ids(SPECIAL["image_token"])
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token,
                                                     image_seq_length=(vision.image_size // vision.patch_size) ** 2,
                                                     tie_word_embeddings=True))


def copy_vision_tower(model: LlavaForConditionalGeneration, clip: CLIPVisionModelWithProjection) -> None:
    """The mini CLIP's vision tower, frozen, as in LLaVA."""
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.model.vision_tower.requires_grad_(False)


def encode(tokenizer, captions: list[str], image_tokens: int) -> dict[str, torch.Tensor]:
    """Prompt, picture places, caption and end as right-padded ids; only the caption and the end are in the labels (else -100)."""
    prompt = PROMPT.replace("<image>", "<image>" * image_tokens)
    texts = [f"{prompt} {caption}{tokenizer.eos_token}" for caption in captions]
    tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
    labels[:, : len(tokenizer(prompt).input_ids)] = -100
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "labels": labels}


def training_batch(images: np.ndarray, masks: np.ndarray, pictures: list[world.Picture], rng: np.random.Generator):
    """Pictures and captions; a quarter of them subjects on white, captioned without the scene."""
    pixels, captions = to_pixels(images), [world.caption(p) for p in pictures]
    white = rng.random(len(pictures)) < 0.25
    background = torch.from_numpy(white)[:, None, None, None] & torch.from_numpy(masks < 128)[:, None]
    for i in np.flatnonzero(white):
        captions[i] = captions[i].split(" " + world.SCENES[pictures[i].scene])[0]
    return pixels.masked_fill(background, 1.0), captions


def loss(model, tokenizer, pixels, captions) -> torch.Tensor:
    """Next-token cross-entropy over the caption; logits are made for the caption's places only."""
    batch = encode(tokenizer, captions, model.config.image_seq_length)
    labels = batch.pop("labels")[:, 1:]
    hidden = model.model(**batch, pixel_values=pixels).last_hidden_state[:, :-1]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[labels >= 0]), labels[labels >= 0])


@torch.no_grad()
def caption_pictures(model, tokenizer, pixels) -> list[str]:
    """Greedy captions."""
    inputs = tokenizer([PROMPT.replace("<image>", "<image>" * model.config.image_seq_length)] * len(pixels), return_tensors="pt")
    ids = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, pixel_values=pixels, do_sample=False,
                         max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
    return [c.strip() for c in tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)]


def caption_accuracy(model, tokenizer, count: int = 256) -> dict[str, float]:
    """How often greedy captions of unseen pictures hold the right category, scene, colour, pattern, or every right word."""
    pictures = sample_world(10_000_000, count, material_rate=0, accessory_rate=0)
    captions = caption_pictures(model.eval(), tokenizer, to_pixels(render(pictures)[0]))
    pairs = list(zip(captions, pictures, strict=True))
    patterns = [(c, p) for c, p in pairs if p.identity.pattern != "plain"]
    return {
        "category": float(np.mean([f" {p.identity.label} " in f" {c} " for c, p in pairs])),
        "scene": float(np.mean([world.SCENES[p.scene] in c for c, p in pairs])),
        "color": float(np.mean([f" {p.identity.color} " in c for c, p in pairs])),
        "pattern": float(np.mean([f" {p.identity.pattern} " in c for c, p in patterns])),
        "exact": float(np.mean([c == world.caption(p) for c, p in pairs])),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--pictures", type=int, default=40000)
    args = parser.parse_args()
    torch.manual_seed(0)
    images, masks, pictures = rendered(args.pictures)
    clip = CLIPVisionModelWithProjection.from_pretrained(FOUNDATION / "image_encoder")
    processor = build_processor()
    clip.config._name_or_path = ""  # else the shipped config names a folder of this machine
    model = build(processor.tokenizer, clip.config)
    copy_vision_tower(model, clip)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    for step in training_steps("llava", args.steps, {"llava": model}, optimizer, args.lr, every=100):
        rng = np.random.default_rng([5, step])
        rows = rng.integers(0, len(images), args.batch)
        pixels, captions = training_batch(images[rows], masks[rows], [pictures[i] for i in rows], rng)
        value = loss(model.train(), processor.tokenizer, pixels, captions)
        optimize(value, optimizer)
        if (step + 1) % 100 == 0:
            print(f"loss {value:.3f}", caption_accuracy(model, processor.tokenizer), flush=True)
    model.eval().save_pretrained(FOUNDATION / "llava")
    processor.save_pretrained(FOUNDATION / "llava")


if __name__ == "__main__":
    main()
