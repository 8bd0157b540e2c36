"""Text alignment: how close a generated picture is to its prompt (CLIP-T, paper section 4)."""

from collections.abc import Sequence

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from evaluation.metrics.encoders import ImageTextEncoder
from evaluation.metrics.per_picture import PerPicture


class TextAlignment(PerPicture):
    """Plain cosine of a picture and its prompt, the mean over pictures.

    template: what CLIP reads, with `{prompt}` in it ("A photo depicts {prompt}" in CLIPScore).
    scale: 1 here and in DreamBooth; CLIPScore has 2.5, torchmetrics 100.
    """

    def __init__(self, encoder: ImageTextEncoder, template: str = "{prompt}", scale: float = 1.0):
        super().__init__(encoder)
        self.template, self.scale = template, scale

    def update(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures but {len(prompts)} prompts")
        self.add(self.cosines(images, prompts))

    def cosines(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float[Tensor, " pictures"]:
        """Scaled cosine of each picture with its own prompt."""
        texts = self.encoder.encode_texts([self.template.format(prompt=prompt) for prompt in prompts])
        return self.scale * (self.encoder.encode_images(images) * texts).sum(1)
