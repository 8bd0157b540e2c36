"""A BLIP-2 with OPT, of the real classes, random and tiny."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
)

WORDS = ["<pad>", "</s>", "<image>", "a", "an", "photo", "of", "on", "the", "in", "tree", "house", "river", "stone", "bridge", "with", "and", "near", "under"]


def save(folder: Path) -> Path:
    torch.manual_seed(0)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="</s>",
                                        additional_special_tokens=["<image>"])
    text = OPTConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=16,
                     max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1, init_std=1.0)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                                        patch_size=14).to_dict(),
        qformer_config=Blip2QFormerConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                          encoder_hidden_size=16).to_dict(),
        text_config=text.to_dict(), num_query_tokens=4, image_token_index=2)
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 28, "width": 28})
    Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)
    return folder
