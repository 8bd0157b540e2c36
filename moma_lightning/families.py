"""The two families of base models, told apart by what `model_index.json` lists: Stable Diffusion (1.x, 2.x) and SDXL."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from moma_lightning.hub import loading, resolve
from moma_lightning.whole import load_whole, require_whole


@dataclass(frozen=True)
class Family:
    """pipeline: diffusers' class. without: its arguments that leave out what MoMA has no use for."""

    pipeline: type[DiffusionPipeline]
    without: dict[str, Any]


TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
STABLE_DIFFUSION = Family(StableDiffusionPipeline, {"safety_checker": None, "requires_safety_checker": False})
SDXL = Family(StableDiffusionXLPipeline, {"add_watermarker": False})


def index_of(name: str) -> dict[str, Any]:
    """`model_index.json` of a folder or hub name."""
    return DiffusionPipeline.load_config(**resolve(name))


def family_of(name: str, index: Mapping[str, Any]) -> Family:
    """The family of a model by its `index_of`. Raises ValueError for a model of neither, SDXL's refiner among them."""
    parts = {part for part, value in index.items() if isinstance(value, list | tuple) and value[0]}
    if not parts >= {"unet", "vae", "text_encoder"} or "text_encoder_3" in parts:
        raise ValueError(f"{name} is neither Stable Diffusion nor SDXL: its model_index.json lists {', '.join(sorted(parts))}")
    return SDXL if "text_encoder_2" in parts else STABLE_DIFFUSION


def load_folder(name: str, vae: AutoencoderKL | None = None) -> DiffusionPipeline:
    """The pipeline of a folder or hub name, in float32, with `vae` instead of its own.

    Raises FileNotFoundError that says how to fetch what is missing, ValueError for a model that is not whole.
    """
    source, given = resolve(name), {"vae": vae} if vae is not None else {}
    if "subfolder" in source:
        raise ValueError(f"{name}: diffusers reads a pipeline from the root of a repository; fetch the folder inside, and name it here")
    with loading(name):
        index = index_of(name)
    family = family_of(name, index)
    for part in TEXT_ENCODERS:
        if index.get(part, [None])[0]:
            model_class = getattr(transformers, index[part][1], None)
            if model_class is None:
                raise ValueError(f"{name}: its model_index.json names {index[part][1]} as {part}, which transformers does not have")
            given[part] = load_whole(model_class, name, source | {"subfolder": part}, dtype=torch.float32)
    with loading(name):
        pipe = family.pipeline.from_pretrained(**source, **family.without, **given, torch_dtype=torch.float32)
    require_whole(name, pipe)
    return pipe
