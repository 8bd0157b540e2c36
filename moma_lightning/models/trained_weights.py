"""A folder of trained parameters: `model.safetensors` and `config.json`, written beside and renamed, read strictly."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moma_lightning.files import write_beside

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write_folder(folder: Path, weights: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Write both files, each whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_beside(folder / WEIGHTS, lambda path: save_file(tensors, path))
    write_beside(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder; FileNotFoundError that says what should be there."""
    return json.loads(_existing(folder / CONFIG).read_text())


@torch.no_grad()
def read_weights(folder: Path, parameters: Mapping[str, Tensor]) -> None:
    """Copy `model.safetensors` into `parameters`, by name; ValueError that names every key that does not fit."""
    path = _existing(folder / WEIGHTS)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from error
    check_fit(str(path), tensors, parameters)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def check_fit(source: str, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """ValueError unless `tensors` have exactly the names and shapes of `parameters`; `source` is named in it."""
    wrong = [f"{name}: missing" for name in parameters if name not in tensors]
    wrong += [f"{name}: not expected" for name in tensors if name not in parameters]
    wrong += [
        f"{name}: shape {list(tensors[name].shape)}, expected {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if wrong:
        shown = "\n  ".join(wrong[:10] + ([f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []))
        raise ValueError(f"{source} does not fit the model:\n  {shown}")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a folder written by save_pretrained ({WEIGHTS} and {CONFIG})")
    return path
