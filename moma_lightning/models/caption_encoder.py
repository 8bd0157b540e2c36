"""CLIP's text tower as a frozen encoder of captions: a baseline for stage 1."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel

from moma_lightning.foundation import frozen
from moma_lightning.hub import loading, resolve
from moma_lightning.whole import load_whole, require_vocabulary


class CaptionEncoder(nn.Module):
    """Captions to CLIP text embeddings, in the space of the image embeddings. Frozen, in eval mode."""

    def __init__(self, clip: CLIPModel, tokenizer):
        super().__init__()
        self.text_model, self.text_projection = frozen(clip.text_model), frozen(clip.text_projection)
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path_or_id: str) -> "CaptionEncoder":
        """The text tower of a whole CLIP model's folder or hub id."""
        location = resolve(path_or_id)
        clip = load_whole(CLIPModel, path_or_id, location)
        with loading(path_or_id):
            tokenizer = AutoTokenizer.from_pretrained(**location)
        require_vocabulary(path_or_id, tokenizer, clip.config.text_config.vocab_size)
        return cls(clip, tokenizer)

    @torch.no_grad()
    def forward(self, captions: list[str]) -> Float[Tensor, "batch embed_dim"]:
        """Captions longer than the tower reads are cut."""
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return self.text_projection(self.text_model(**tokens.to(self.text_projection.weight.device)).pooler_output)
