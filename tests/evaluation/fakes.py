"""A data folder drawn at random, encoders of plain arithmetic, and a method that paints from seeds."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn import functional as F

from evaluation.config import EvalConfig, WandbConfig
from evaluation.extra_scores import Judges
from evaluation.methods import Method
from evaluation.metrics import CachedEncoder, ImageTextEncoder, Masker
from evaluation.plan import Evaluation
from evaluation.scoring import score
from experiments.mini.models import PROTOCOL, mini_foundation

SUBJECTS = {"red_mug": "mug", "old_boot": "boot", "tabby": "cat"}
PROMPTS = ["in the snow", "on the beach", "in the jungle", "on a lake", "in the city"]


def random_picture(seed: int, size: tuple[int, int] = (24, 24)) -> Image.Image:
    """Blocks of colour, so that resizing does not wash them out."""
    colors = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize(size, Image.Resampling.NEAREST)


def write_data(root: Path, pictures: int = 3) -> Path:
    """A folder in google/dreambooth's layout with masks."""
    listed = "\n".join(f"'a {{0}} {{1}} {p}'.format(unique_token, class_token)," for p in PROMPTS)
    lists = f"prompt_list = [\n{listed}\n]\n"
    for s, name in enumerate(SUBJECTS):
        for i in range(pictures):
            for folder, image in (("dataset", random_picture(10 * s + i)), ("masks", Image.new("L", (24, 24), 255))):
                path = root / folder / name / f"{i:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    classes = "\n".join(f"{name},{label}" for name, label in SUBJECTS.items())
    text = f"Classes\n\nsubject_name,class\n{classes}\n\nPrompts\n\nObject Prompts\n\n{lists}\nLive Subject Prompts\n\n{lists}"
    (root / "dataset" / "prompts_and_classes.txt").write_text(text)
    return root


class ColorEncoder(ImageTextEncoder):
    """Pictures: colours of a 3 x 3 reduction. Texts: a random direction by their digest. Counts what it is asked."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def encode_images(self, images):
        self.seen += len(images)
        pixels = [torch.from_numpy(np.array(image.convert("RGB"), np.float32)).permute(2, 0, 1) for image in images]
        pooled = torch.stack([F.adaptive_avg_pool2d(one, 3) for one in pixels])
        return F.normalize(pooled.flatten(1) / 127.5 - 0.9, dim=-1)

    def encode_texts(self, texts):
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in texts]
        return F.normalize(torch.stack([torch.randn(27, generator=torch.Generator().manual_seed(seed)) for seed in seeds]), dim=-1)


def fake_judges(evaluation: Evaluation, masker: Masker | None = None) -> Judges:
    return Judges(evaluation.protocol, {"dino": CachedEncoder(ColorEncoder()), "clip": CachedEncoder(ColorEncoder())}, masker)


def fake_score(config: EvalConfig, masker: Masker | None = None) -> pd.DataFrame:
    """The config's pictures by judges of plain arithmetic."""
    evaluation = Evaluation.open(config)
    return score(evaluation, config.methods, fake_judges(evaluation, masker))


class CentreSam(torch.nn.Module):
    """Finds the middle quarter of every picture."""

    def forward(self, image):
        mask = torch.zeros(1, image.height, image.width)
        mask[:, image.height // 4 : -(image.height // 4), image.width // 4 : -(image.width // 4)] = 1
        return mask


@dataclass
class Painter(Method):
    """The reference under noise: `noise` 0 is a copy of the input. Stops after `fail_after` pictures, as a kill would."""

    noise: float = 0.5
    log: str | None = None
    fail_after: int | None = None

    def options(self):
        return {"kind": "Painter", "noise": self.noise}

    def generate(self, subject, reference, tasks):
        images = []
        for task in tasks:
            if self.fail_after is not None and len(made(self.log)) >= self.fail_after:
                raise KeyboardInterrupt
            noise = np.random.default_rng(task.seed).integers(0, 256, (24, 24, 3))
            mixed = (1 - self.noise) * np.asarray(reference.image, float) + self.noise * noise
            images.append(Image.fromarray(mixed.round().astype(np.uint8)))
            if self.log:
                with open(self.log, "a") as file:
                    file.write(json.dumps([subject.name, task.prompt, task.seed]) + "\n")
        return images


class BlindPainter(Painter):
    """Noise alone."""

    uses_reference = False

    def generate(self, subject, reference, tasks):
        return super().generate(subject, SimpleNamespace(image=Image.new("RGB", (24, 24))), tasks)


def made(log: str | None) -> list[list]:
    """What painters with this log have made."""
    path = Path(log) if log else None
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def fake_config(tmp_path: Path, methods: dict[str, Method], overrides: dict | None = None, **rest) -> EvalConfig:
    """3 subjects x (2 context + 1 texture) prompts x 1 picture."""
    if not (tmp_path / "data").exists():
        write_data(tmp_path / "data")
    changed = {"context_prompts": 2, "texture_prompts": 1, "extra_scores": [], **(overrides or {})}
    return EvalConfig(run=str(tmp_path / "run"), data=str(tmp_path / "data"), protocol=PROTOCOL, foundation=rest.pop("foundation", None) or mini_foundation(),
                      overrides=changed, methods=methods, batch_size=2, wandb=WandbConfig(enabled=False), **rest)
