"""What was worked out for a picture once is read back: its embeddings, and its subject's mask.

Both are known by the picture's pixels and by everything that moves them, so scoring goes on where it stopped and no stale
value can be read.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from evaluation.metrics.encoders import EncoderConfig, ImageTextEncoder, build_encoder


class CachedEncoder(ImageTextEncoder):
    """Remembers image embeddings, in memory and, given a path, in an .npz file between runs.

    Cosines of unit vectors do not need the pictures again.
    """

    def __init__(self, encoder: ImageTextEncoder, path: Path | None = None, batch_size: int = 64):
        super().__init__()
        self.encoder, self.path, self.batch_size = encoder, path, batch_size
        self.known: dict[str, Tensor] = {}
        if path is not None and path.exists():
            with np.load(path) as file:
                self.known = dict(zip(file["digests"].tolist(), torch.from_numpy(file["embeds"]), strict=True))

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
        if self.path is None or not self.known:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.npz")
        np.savez(beside, digests=np.array(list(self.known)), embeds=torch.stack(list(self.known.values())).numpy())
        beside.replace(self.path)


def pixel_digest(image: Image.Image) -> str:
    """Digest of what is seen (mode, size, pixels), the same for one picture stored in two formats."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def build_encoders(configs: Mapping[str, EncoderConfig], cache: Path | None = None, device: str = "cpu") -> dict[str, CachedEncoder]:
    """The encoders by name, with caches under `cache` in files named by the encoder's settings and weights."""
    encoders = {}
    for name, config in configs.items():
        encoder = build_encoder(config).to(device)
        encoders[name] = CachedEncoder(encoder, cache and cache / f"{name}-{fingerprint(encoder, config)}.npz")
    return encoders


def fingerprint(encoder: nn.Module, config: EncoderConfig) -> str:
    """Twelve digits that change with any setting and any weight."""
    digest = hashlib.sha256(repr(sorted(asdict(config).items())).encode())
    digest.update(weights_digest(encoder).encode())
    return digest.hexdigest()[:12]


def weights_digest(module: nn.Module) -> str:
    """Digest of every parameter and buffer with its name."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.float().cpu().numpy().tobytes())
    return digest.hexdigest()
