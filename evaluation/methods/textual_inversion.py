"""Textual Inversion: one new word, learned from the subject's picture (Gal et al., arXiv 2208.01618)."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageOps
from torch import Tensor, nn

from evaluation.methods.base import Models
from evaluation.methods.tuned import TunedMethod, Weights, reworded
from evaluation.tasks import PictureTask
from moma_lightning.families import SDXL, family_of, index_of
from moma_lightning.single_file import is_single_file

#: The neutral texts of the paper's supplement (CLIP's ImageNet templates), as diffusers' textual_inversion script has them.
TEMPLATES = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of a clean {}",
    "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}", "a photo of the cool {}", "a close-up photo of a {}",
    "a bright photo of the {}", "a cropped photo of a {}", "a photo of the {}", "a good photo of the {}", "a photo of one {}",
    "a close-up photo of the {}", "a rendition of the {}", "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}",
    "a good photo of a {}", "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}", "a photo of the large {}",
    "a photo of a cool {}", "a photo of a small {}",
)
PLACEHOLDER = "<subject>"


@dataclass
class TextualInversion(TunedMethod):
    """Learns the embedding of one new token; in prompts it stands in the label's place ("a <subject> in the snow").

    Defaults are those of diffusers' textual_inversion example (batch 4 at 4 x 5e-4, 3000 steps, half of the pictures mirrored),
    for a Stable Diffusion 1.5 base; not measured there, for want of its weights. The token starts as the mean of the label's
    tokens: the example's labels are one token, DreamBooth's ("stuffed animal") are not.
    """

    steps: int = 3000
    learning_rate: float = 2e-3
    batch_size: int = 4
    templates: list[str] = field(default_factory=lambda: list(TEMPLATES))

    def require(self, models: Models) -> None:
        super().require(models)
        base, configs = models.foundation.base, models.foundation.base_config
        name = configs if is_single_file(base) and configs is not None else base
        if family_of(name, index_of(name)) is SDXL:
            raise ValueError(f"TextualInversion learns a word of one text encoder, and {name} (SDXL) reads prompts with two: use DreamBoothLora")

    @contextmanager
    def tuned(self, label: str, weights: Weights | None = None) -> Iterator[dict[str, nn.Parameter]]:
        pipeline = self.pipeline
        tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder
        embedding = text_encoder.get_input_embeddings()
        pipeline.tokenizer = copy.deepcopy(tokenizer)
        pipeline.tokenizer.add_tokens([PLACEHOLDER])
        start = label_embedding(tokenizer, embedding, label) if weights is None else weights["token"].to(embedding.weight)
        extended = PlaceholderEmbedding(embedding, pipeline.tokenizer.convert_tokens_to_ids(PLACEHOLDER), start)
        try:
            text_encoder.set_input_embeddings(extended)
            yield {"token": extended.token}
        finally:
            text_encoder.set_input_embeddings(embedding)
            pipeline.tokenizer = tokenizer

    def captions(self, label: str, random: np.random.Generator) -> list[str]:
        return [str(text).format(PLACEHOLDER) for text in random.choice(self.templates, self.batch_size)]

    def augmented(self, pictures: list[Image.Image]) -> list[Image.Image]:
        return [*pictures, *(ImageOps.mirror(picture) for picture in pictures)]

    def worded(self, task: PictureTask) -> PictureTask:
        return reworded(task, PLACEHOLDER)


class PlaceholderEmbedding(nn.Module):
    """A frozen embedding table with one more, trained, row: nothing else can change, weight decay included."""

    def __init__(self, table: nn.Embedding, token_id: int, start: Float[Tensor, " dim"]):
        super().__init__()
        self.table, self.token_id, self.token = table, token_id, nn.Parameter(start.detach().clone())

    @property
    def weight(self) -> Float[Tensor, "rows dim"]:
        return self.table.weight

    def forward(self, ids: Int[Tensor, "batch text"]) -> Float[Tensor, "batch text dim"]:
        known = self.table(ids.clamp(max=self.table.num_embeddings - 1))
        return torch.where((ids == self.token_id)[..., None], self.token, known)


def label_embedding(tokenizer, table: nn.Embedding, label: str) -> Float[Tensor, " dim"]:
    ids = tokenizer(label, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return table(ids.to(table.weight.device)).mean(0)
