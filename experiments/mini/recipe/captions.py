"""Caption styles the base models hear, and the BPE tokenizer trained on them."""

import itertools
import json

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from datamodules.mini import world

MAX_TOKENS = 24

#: The words of the prompt templates that MoMA, IP-Adapter and DreamBooth use, so that none of them is unknown.
TEMPLATES = (
    "a photo of a {label}.", "photo of a {label}.", "an image of a {label}. describe", "describe a new image of the same {label} in:",
    "user:", "assistant:", "a picture of a {label} and an {label}", "*",
)


def caption_style(picture: world.Picture, rng: np.random.Generator) -> str:
    """One caption of a picture: mostly the full one, sometimes filtered, shortened or with SD-style prefixes."""
    full = world.caption(picture)
    draw = rng.random()
    if draw < 0.25:
        full = world.filter_caption(full)
    elif draw < 0.32:
        full = full.replace(" " + world.SCENES[picture.scene], "").replace(" " + (world.LIGHTS[picture.light] or "|"), "")
    prefix = rng.random()
    if prefix < 0.2:
        return f"photo of a {picture.identity.label}. {full}"
    return f"a photo of {full}" if prefix < 0.35 else full


def corpus() -> list[str]:
    words = [*world.COLORS, *world.PATTERNS, *world.MATERIALS, *world.ACCESSORIES, *world.SCENES.values(), *world.LIGHTS.values()]
    words.append("wearing made of wood gold stone ice moss")
    return words + [t.format(label=label) for t, label in itertools.product(TEMPLATES, world.LABELS)]


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make every word of the mini world one token."""
    trainer_tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer_tokenizer.normalizer = normalizers.Lowercase()
    trainer_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    trainer_tokenizer.train_from_iterator(corpus(), trainer)
    learned = learned_merges(trainer_tokenizer)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in learned]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocab, merges=learned, model_max_length=MAX_TOKENS)


def learned_merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merges a trained tokenizer holds, in order."""
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
