"""What was worked out for a picture once is read back: its embeddings, and its subject's mask.

Both are known by the picture's pixels and by everything that moves them, so scoring goes on where it stopped and no stale
value can be read.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from evaluation.metrics.configs import EncoderConfig
from evaluation.metrics.encoders import ImageTextEncoder, build_encoder
from moma_lightning.digests import identity
from moma_lightning.files import write_beside
from moma_lightning.hub import local_path


class CachedEncoder(ImageTextEncoder):
    """Remembers image embeddings, in memory and, given a path, in an .npz file between runs.

    Cosines of unit vectors do not need the pictures again. part: number of the process, where several work at once: each reads what
    all have found and writes what itself found into a file of its own; a later encoder without a part puts these into the one file.
    """

    def __init__(self, encoder: ImageTextEncoder, path: Path | None = None, batch_size: int = 64, part: int | None = None):
        super().__init__()
        self.encoder, self.path, self.batch_size, self.part = encoder, path, batch_size, part
        self.known: dict[str, Tensor] = {}
        self.parts = sorted(path.parent.glob(f"{path.stem}.part*.npz")) if path is not None else []
        for file in (path, *self.parts):
            if file is not None and file.exists():
                self.known |= read_embeds(file)
        self.read = set(self.known) if part is not None else set()

    def encode_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "batch dim"]:
        digests = [pixel_digest(image) for image in images]
        missing = list({d: image for d, image in zip(digests, images, strict=True) if d not in self.known}.items())
        for start in range(0, len(missing), self.batch_size):
            part = missing[start : start + self.batch_size]
            embeds = self.encoder.encode_images([image for _, image in part]).cpu()
            self.known.update(zip([digest for digest, _ in part], embeds, strict=True))
        return torch.stack([self.known[digest] for digest in digests])

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        return self.encoder.encode_texts(texts).cpu()

    def save(self) -> None:
        """Write what is known; a part writes what it found itself, on top of what its file held."""
        if self.path is None or self.known.keys() == self.read:
            return
        if self.part is None:
            write_embeds(self.path, self.known)
            for part in self.parts:
                part.unlink(missing_ok=True)
        else:
            own = self.path.with_name(f"{self.path.stem}.part{self.part}.npz")
            before = read_embeds(own) if own.exists() else {}
            write_embeds(own, before | {digest: embed for digest, embed in self.known.items() if digest not in self.read})


def read_embeds(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return dict(zip(file["digests"].tolist(), torch.from_numpy(file["embeds"]), strict=True))


def write_embeds(path: Path, embeds: Mapping[str, Tensor]) -> None:
    content = {"digests": np.array(list(embeds)), "embeds": torch.stack(list(embeds.values())).numpy()}
    write_beside(path, lambda beside: np.savez(beside, **content))


def pixel_digest(image: Image.Image) -> str:
    """Digest of what is seen (mode, size, pixels), the same for one picture stored in two formats."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def build_encoders(
    configs: Mapping[str, EncoderConfig], cache: Path | None = None, device: str = "cpu", part: int | None = None
) -> dict[str, CachedEncoder]:
    """The encoders by name, with caches under `cache` in files named by the encoder's settings and weights."""
    encoders = {}
    for name, config in configs.items():
        encoder = build_encoder(config).to(device)
        encoders[name] = CachedEncoder(encoder, cache and cache / f"{name}-{fingerprint(encoder, config)}.npz", part=part)
    return encoders


def fingerprint(encoder: nn.Module, config: EncoderConfig) -> str:
    """Twelve digits that change with any setting, any weight and, of a model in a folder, any file, its processor's too."""
    digest = hashlib.sha256(repr(sorted(asdict(config).items())).encode())
    if local_path(config.model) is not None:
        digest.update(identity(config.model).encode())
    digest.update(weights_digest(encoder).encode())
    return digest.hexdigest()[:12]


def weights_digest(module: nn.Module) -> str:
    """Digest of every parameter and buffer with its name."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.float().cpu().numpy().tobytes())
    return digest.hexdigest()
