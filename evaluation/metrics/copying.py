"""Does a method repeat itself, and does it repeat its input? Two scores that fidelity alone cannot tell."""

from collections.abc import Sequence

import torch
from PIL import Image

from evaluation.metrics.per_picture import PerPicture


class SeedDiversity(PerPicture):
    """1 - mean pairwise cosine of the pictures that one prompt gives from different noise (DreamBooth's DIV does it with LPIPS).

    A picture's value is 1 - its mean cosine with the others of its prompt; the mean of these is 1 - the mean over pairs. NaN where a
    prompt has one picture. Values are in [0, 2]; 0: the same picture each time.
    """

    def update(self, images: Sequence[Image.Image]) -> None:
        """`images`: all pictures of one prompt and reference."""
        embeds = self.encoder.encode_images(images)
        cosine = embeds @ embeds.T
        others = (cosine.sum(1) - cosine.diagonal()) / (len(images) - 1) if len(images) > 1 else torch.full((1,), torch.nan)
        self.add(1 - others)


class CopyPaste(PerPicture):
    """How much closer a picture is to the input than to the subject's other real pictures: cos(x, input) - mean cos(x, others).

    All real pictures show the same subject, so a method that knows the subject is as close to the others as to the input: about 0. One
    that repeats the input (its pose, light, background) is closer to it; an exact copy reaches 1 - mean cos(input, others), the
    distance between real pictures, which no fidelity score sees because the input counts among the real pictures there. The idea
    is the copy-paste measure for faces of WithAnyone (Xu et al. 2025, arXiv 2510.14975), as a plain difference: one number
    less to trust than a ratio. A method that ignores the input has 0 too: read it beside fidelity. NaN without other pictures.
    """

    higher_is_better = False

    def update(self, images: Sequence[Image.Image], reference: Image.Image, others: Sequence[Image.Image]) -> None:
        """`reference`: the input of all `images`; `others`: the subject's real pictures without it."""
        if not others:
            self.add(torch.full((len(images),), torch.nan))
            return
        embeds = self.encoder.encode_images(images)
        to_input = embeds @ self.encoder.encode_images([reference])[0]
        self.add(to_input - (embeds @ self.encoder.encode_images(others).T).mean(1))
