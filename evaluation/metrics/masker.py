"""The subject's mask in any picture, by SAM, found once."""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from evaluation.metrics.cache import pixel_digest, weights_digest
from evaluation.metrics.masked import Mask
from moma_lightning.digests import identity
from moma_lightning.files import write_bytes
from moma_lightning.segmentation import NothingFoundError, SamMasker

#: Masks in memory where a folder has them too: those of a whole evaluation at 512 pixels would be gigabytes.
HELD = 512


class Masker:
    """Masks by pixels, in memory and, given a folder, as PNG files between runs, apart for each `model` (by default what its weights are).

    sam: a SamMasker, or another module that takes a picture and raises NothingFoundError where it finds nothing. Then the mask is empty:
    that is an answer too, and is kept like the others.
    """

    def __init__(self, sam: nn.Module, folder: Path | None = None, model: str | None = None):
        self.sam, self.known = sam, dict[str, Mask]()
        self.folder = folder and folder / f"masks-{hashlib.sha256((model or weights_digest(sam)).encode()).hexdigest()[:12]}"

    @classmethod
    def from_pretrained(cls, path: str, folder: Path | None = None, device: str = "cpu") -> "Masker":
        """As `SamMasker.from_pretrained`, which raises FileNotFoundError and ValueError."""
        return cls(SamMasker.from_pretrained(path).to(device), folder, identity(path))

    def __call__(self, image: Image.Image) -> Mask:
        digest = pixel_digest(image)
        if digest not in self.known:
            if self.folder and len(self.known) >= HELD:
                del self.known[next(iter(self.known))]
            self.known[digest] = self._read_or_find(image, digest)
        return self.known[digest]

    def _read_or_find(self, image: Image.Image, digest: str) -> Mask:
        path = self.folder and self.folder / f"{digest[:32]}.png"
        if path and path.exists():
            return np.asarray(Image.open(path)) > 0
        mask = self._find(image)
        if path:
            buffer = io.BytesIO()
            Image.fromarray(mask).save(buffer, format="PNG")
            write_bytes(path, buffer.getvalue())
        return mask

    @torch.no_grad()
    def _find(self, image: Image.Image) -> Mask:
        try:
            return self.sam(image)[0].cpu().numpy() > 0.5
        except NothingFoundError:
            return np.zeros((image.height, image.width), bool)
