"""A folder of trained parameters: `model.safetensors` and `config.json`, written beside and renamed, read strictly."""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moma_lightning.files import write_beside, write_json

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write_folder(folder: Path, weights: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Write both files, each whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_beside(folder / WEIGHTS, lambda path: save_file(tensors, path))
    write_json(folder / CONFIG, config, indent=2)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a decoder's folder; FileNotFoundError that says what should be there, ValueError for another model's."""
    content = json.loads(_existing(folder / CONFIG).read_text())
    if not {"embed_dim", "decoder"} <= content.keys():
        raise ValueError(f"{folder / CONFIG} is not an image-feature decoder's: it lacks embed_dim and decoder. Name stage 1's image_feature_decoder folder")
    return content


@torch.no_grad()
def read_weights(folder: Path, parameters: Mapping[str, Tensor], unread: Collection[str] = ()) -> None:
    """Copy `model.safetensors` into `parameters`, by name, and log what was read; ValueError that names every key that does not fit.

    unread: names that a file may have besides.
    """
    path = folder / WEIGHTS
    tensors = {name: tensor for name, tensor in read_tensors(path).items() if name in parameters or name not in unread}
    logger.info("%s", check_fit(str(path), tensors, parameters))
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; FileNotFoundError or ValueError that name it."""
    try:
        return load_file(_existing(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from error


@dataclass(frozen=True)
class Fit:
    """How the entries of `source` compare with a model's parameters. Another dtype is told, and no error: values are converted."""

    source: str
    read: int
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    retyped: list[str]

    @property
    def wrong(self) -> list[str]:
        """What an error names, the shapes first: they tell the most where the file is another model's."""
        return self.reshaped + self.missing + self.unexpected

    def __str__(self) -> str:
        counts = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.reshaped, "of another dtype": self.retyped}
        told = [f"{self.source}: {self.read} entries, " + ", ".join(f"{len(names)} {kind}" for kind, names in counts.items())]
        return "\n  ".join(told + [line for names in counts.values() for line in (*names[:10], *_more(names))])


def check_fit(source: str, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Fit:
    """ValueError unless `tensors` have exactly the names and shapes of `parameters`; `source` is named in it."""
    both = [(name, tensors[name], parameter) for name, parameter in parameters.items() if name in tensors]
    fit = Fit(
        source,
        len(tensors),
        [f"{name}: missing" for name in parameters if name not in tensors],
        [f"{name}: not expected" for name in tensors if name not in parameters],
        [f"{name}: shape {list(a.shape)}, expected {list(b.shape)}" for name, a, b in both if a.shape != b.shape],
        [f"{name}: {a.dtype}, read as {b.dtype}".replace("torch.", "") for name, a, b in both if a.dtype != b.dtype],
    )
    if fit.wrong:
        raise ValueError("\n  ".join([f"{source} does not fit the model:", *fit.wrong[:10], *_more(fit.wrong)]))
    return fit


def _more(lines: list[str]) -> list[str]:
    return [f"and {len(lines) - 10} more"] if len(lines) > 10 else []


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a folder written by save_pretrained ({WEIGHTS} and {CONFIG})")
    return path
