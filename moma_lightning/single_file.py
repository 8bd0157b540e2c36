"""Community checkpoints of Stable Diffusion and SDXL: one `.safetensors` or `.ckpt` file in the original layout, read by diffusers' `from_single_file`."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import snapshot_download
from torch import nn

from moma_lightning.families import family_of
from moma_lightning.hub import find_file, hub_name, loading, local_path

SUFFIXES = (".safetensors", ".ckpt")


def is_single_file(name: str) -> bool:
    return name.endswith(SUFFIXES)


def load_single_file(name: str, config: str | None, vae: AutoencoderKL | None = None) -> DiffusionPipeline:
    """The pipeline in `name`, in float32. Nothing is asked of the hub but what the two names say.

    config: folder or hub name of a diffusers model of the same architecture; the file holds neither configs nor a tokenizer.
    vae: instead of the file's; "noVAE" files have none. Raises ValueError without a config, or where the file lacks weights.
    """
    if config is None:
        raise ValueError(f"{name} is a single file, without configs and tokenizer: set foundation.base_config to a diffusers folder or hub name "
                         "of the same architecture, e.g. stable-diffusion-v1-5/stable-diffusion-v1-5")  # fmt: skip
    path, given = find_file(name), {"vae": vae} if vae is not None else {}
    folder = config_folder(config)
    family = family_of(str(folder))
    try:
        pipe = family.pipeline.from_single_file(
            str(path), config=str(folder), local_files_only=True, torch_dtype=torch.float32, feature_extractor=None, **family.without, **given,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        hint = "; a file without a VAE needs foundation.vae" if "AutoencoderKL" in str(error) and vae is None else ""
        told = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} could not be read as a Stable Diffusion checkpoint with the configs of {config}: {told}{hint}") from error
    require_all_weights(pipe, path)
    return pipe


def require_all_weights(pipe: DiffusionPipeline, path: Path) -> None:
    """diffusers leaves a parameter that the file lacks without memory, and says so in a warning only."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    lacking = [f"{part}.{name}" for part, module in parts.items() for name, value in module.named_parameters() if value.is_meta]
    if lacking:
        raise ValueError(f"{path} lacks {len(lacking)} weights of the model: {', '.join(lacking[:3])}, ...")


def config_folder(config: str) -> Path:
    """The folder with `model_index.json`: here, or of the hub's repository what is no weights."""
    if (found := local_path(config)) is not None:
        return found
    hub = hub_name(config)
    with loading(config):
        return Path(snapshot_download(hub.repo_id, revision=hub.revision, allow_patterns=["*.json", "*.txt"]))
