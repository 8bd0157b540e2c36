import torch
from transformers import AutoTokenizer, CLIPModel

from moma_lightning.models.caption_encoder import CaptionEncoder


@torch.no_grad()
def test_equals_clips_text_features(tiny_foundation):
    folder = tiny_foundation.mllm.replace("llava", "clip")
    captions = ["a cat", "a toy robot in the snow at night"]
    tokens = AutoTokenizer.from_pretrained(folder)(captions, padding="max_length", truncation=True, return_tensors="pt")
    expected = CLIPModel.from_pretrained(folder).get_text_features(**tokens).pooler_output
    encoder = CaptionEncoder.from_pretrained(folder)
    assert torch.equal(encoder(captions), expected)
    assert not any(p.requires_grad for p in encoder.parameters())


@torch.no_grad()
def test_long_captions_are_cut(tiny_foundation):
    encoder = CaptionEncoder.from_pretrained(tiny_foundation.mllm.replace("llava", "clip"))
    long, cut = "a cat in the snow " * 40, "a cat in the snow " * 20
    assert len(encoder.tokenizer(cut).input_ids) > encoder.tokenizer.model_max_length
    assert torch.equal(encoder([long]), encoder([cut])) and not torch.allclose(encoder([long]), encoder(["a cat in the snow"]))
