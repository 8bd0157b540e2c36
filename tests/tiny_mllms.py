"""Random tiny multimodal LLMs of each family that stage 1 takes: the real classes, made from their configs, in hub folder layout."""

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from experiments.mini.recipe import llava

HIDDEN = 32
#: Side of the pictures: 16 where the config has it, 24 (three rows of windows of two) for Qwen-VL.
SIDE, QWEN_SIDE = 16, 24
VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=4)
QWEN_VISION = dict(hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=HIDDEN)
QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


@lru_cache
def _words() -> PreTrainedTokenizerFast:
    return llava.build_tokenizer()


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    made = copy.deepcopy(_words())
    made.add_tokens(list(special), special_tokens=True)
    return made


def text_options(words: PreTrainedTokenizerFast) -> dict:
    """Weights larger than usual, so that a wrong place or mask shows in the output."""
    return dict(vocab_size=len(words), hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                max_position_embeddings=256, pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
                initializer_range=0.3)


def idefics3() -> tuple[PreTrainedModel, ProcessorMixin]:
    words = tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    pictures = Idefics3ImageProcessor(size={"longest_edge": 4 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = Idefics3Processor(pictures, words, image_seq_len=4)
    config = Idefics3Config(vision_config=VISION, text_config=LlamaConfig(**text_options(words)), scale_factor=2, image_token_id=processor.image_token_id)
    return Idefics3ForConditionalGeneration(config), processor


def smolvlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    words = tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>")
    sizes = dict(size={"longest_edge": 4 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = SmolVLMProcessor(SmolVLMImageProcessor(**sizes), words, SmolVLMVideoProcessor(**sizes), image_seq_len=4)
    config = SmolVLMConfig(vision_config=VISION, text_config=LlamaConfig(**text_options(words)), scale_factor=2, image_token_id=processor.image_token_id)
    return SmolVLMForConditionalGeneration(config), processor


def llava_onevision() -> tuple[PreTrainedModel, ProcessorMixin]:
    words, grids = tokenizer("<video>"), [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    pictures = LlavaOnevisionImageProcessor(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=grids)
    processor = LlavaOnevisionProcessor(pictures, words, LlavaOnevisionVideoProcessor(), num_image_tokens=16, vision_feature_select_strategy="full")
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False), text_config=Qwen2Config(**text_options(words)), image_grid_pinpoints=grids,
        image_token_index=processor.image_token_id, video_token_index=processor.video_token_id,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    words = tokenizer(*QWEN_TOKENS)
    words.image_token = "<|image_pad|>"
    return words


def qwen_ids(words: PreTrainedTokenizerFast) -> dict:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, words.convert_tokens_to_ids(list(QWEN_TOKENS)), strict=True))


def qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    words, sizes = qwen_tokenizer(), dict(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 10**6})
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**sizes), words, Qwen2VLVideoProcessor(**sizes))
    text = text_options(words) | {"rope_parameters": QWEN_ROPE}
    vision = QWEN_VISION | dict(depth=2, window_size=16, fullatt_block_indexes=[1])
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **qwen_ids(words))), processor


def qwen3_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    words, sizes = qwen_tokenizer(), dict(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 10**6})
    processor = Qwen3VLProcessor(Qwen2VLImageProcessor(**sizes), words, Qwen3VLVideoProcessor(**sizes))
    text = text_options(words) | {"rope_parameters": QWEN_ROPE | {"mrope_interleaved": True}, "head_dim": 16}
    vision = QWEN_VISION | dict(depth=3, num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **qwen_ids(words))), processor


#: By `model_type`.
MLLMS: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    made.__name__: made for made in (idefics3, smolvlm, llava_onevision, qwen2_5_vl, qwen3_vl)
}


def image_size(family: str) -> int | None:
    """`DecoderConfig.image_size` of the tiny models."""
    return QWEN_SIDE if family.startswith("qwen") else None


def write(family: str, folder: Path) -> None:
    torch.manual_seed(0)
    for part in MLLMS[family]():
        part.save_pretrained(folder)
