"""Community checkpoints of Stable Diffusion and SDXL: one `.safetensors` or `.ckpt` file in the original layout, or a LoRA, read by diffusers."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import is_peft_available
from safetensors import SafetensorError, safe_open
from torch import nn

from moma_lightning.families import family_of, index_of, load_folder
from moma_lightning.fetch import NOT_READ
from moma_lightning.hub import find_file, find_snapshot
from moma_lightning.whole import require_whole

SUFFIXES = (".safetensors", ".ckpt")


def is_single_file(name: str) -> bool:
    return name.endswith(SUFFIXES)


def load_single_file(name: str, config: str | None, vae: AutoencoderKL | None = None) -> DiffusionPipeline:
    """The pipeline in `name`, in float32. Nothing is asked of the hub but what the two names say.

    config: folder or hub name of a diffusers model of the same architecture; the file holds neither configs nor a tokenizer. A LoRA is added
        to that model's weights, at the scale that its own alphas say.
    vae: instead of the file's; "noVAE" files have none. Raises ValueError without a config, where the file lacks weights, or is a LoRA of another
        architecture; ImportError for a LoRA without peft.
    """
    if config is None:
        raise ValueError(f"{name} is a single file, without configs and tokenizer: set foundation.base_config to a diffusers folder or hub name "
                         "of the same architecture, e.g. stable-diffusion-v1-5/stable-diffusion-v1-5")
    path, given = find_file(name), {"vae": vae} if vae is not None else {}
    if is_lora(name):
        if is_single_file(config):
            raise ValueError(f"{name} is a LoRA: it needs the whole model as a diffusers folder or hub name in foundation.base_config, not the file {config}")
        return with_lora(load_folder(config, vae), path)
    folder = str(find_snapshot(config, ["*.json", "*.txt"], but=NOT_READ))
    family = family_of(folder, index_of(folder))
    try:
        pipe = family.pipeline.from_single_file(
            str(path), config=folder, local_files_only=True, torch_dtype=torch.float32, feature_extractor=None, **family.without, **given,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        hint = "; a file without a VAE needs foundation.vae" if "AutoencoderKL" in str(error) and vae is None else ""
        told = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} could not be read as a Stable Diffusion checkpoint with the configs of {config}: {told}{hint}") from error
    require_whole(str(path), pipe)
    return pipe


def is_lora(name: str) -> bool:
    """Whether `name`, as FoundationConfig's, is a file of low-rank updates and no model. Raises ValueError for a file that cannot be read."""
    if not name.endswith(".safetensors"):
        return False
    path = find_file(name)
    try:
        with safe_open(path, "pt") as file:
            return any("lora" in name for name in file.keys())  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} could not be read: {error}") from error


def with_lora(pipe: DiffusionPipeline, path: Path) -> DiffusionPipeline:
    """`pipe` with a LoRA added to its weights for good. diffusers passes over what it has no place for; here that is an error."""
    if not is_peft_available():
        raise ImportError(f"{path} is a LoRA, which needs peft: pip install 'moma-lightning[lora]'")
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    if any("dora_scale" in name for name in names):
        raise ValueError(f"{path} is a DoRA: diffusers would leave its magnitudes out and draw something else")
    held = sum(name.endswith(("up.weight", "lora_B.weight")) for name in names)
    try:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)  # not its tensors alone: alphas may be in the file's header
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} could not be read as a LoRA of {type(pipe).__name__}: {' '.join(str(error).split())[:300]}") from error
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    taken = sum(len(module.lora_B) for part in parts for module in part.modules() if isinstance(getattr(module, "lora_B", None), nn.ModuleDict))
    if not 0 < held == taken:
        why = "it is of another architecture, or its names are neither diffusers' nor kohya's"
        raise ValueError(f"{path} holds {held} low-rank updates, of which {taken} fit a layer of the model: {why}")
    pipe.fuse_lora(components=[name for name in pipe._lora_loadable_modules if getattr(pipe, name, None) is not None])
    pipe.unload_lora_weights()
    return pipe
