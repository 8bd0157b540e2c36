"""Subject fidelity: how close a generated picture is to the subject's real ones (DINO and CLIP-I, paper section 4)."""

from collections.abc import Sequence

from PIL import Image

from evaluation.metrics.per_picture import PerPicture


class SubjectSimilarity(PerPicture):
    """Mean cosine between a generated picture and the real pictures it is compared to; then the mean over pictures.

    DINO or CLIP-I, as the encoder says (DreamBooth, section 4.1). Values are in [-1, 1].
    """

    def update(self, images: Sequence[Image.Image], real: Sequence[Image.Image]) -> None:
        """`images`: generated pictures of one subject; `real`: every real picture each of them is compared to."""
        if not real:
            raise ValueError("no real picture to compare to: is this a subject with one picture, compared to the others?")
        cosine = self.encoder.encode_images(images) @ self.encoder.encode_images(real).T
        self.add(cosine.mean(1))
