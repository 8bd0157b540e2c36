"""LoRA adapters of an image-feature decoder's folder, added to the language model that they were trained on."""

from pathlib import Path

from jsonargparse import ArgumentParser

from moma_lightning.foundation import FoundationConfig
from moma_lightning.models.image_feature_decoder import ImageFeatureDecoder


def merge_lora(source: str, target: str, foundation: str) -> str:
    """Read the decoder's folder `source` on the MLLM of `foundation` (a YAML), write it merged to `target`, and return the report.

    Weights are in the foundation's `mllm_dtype`. Raises ValueError where there are no adapters, or where `target` is `source`;
    and as `ImageFeatureDecoder.from_pretrained` does.
    """
    if Path(target).resolve() == Path(source).resolve():
        raise ValueError(f"{target} is the source: name another folder, for the merged decoder takes the place of the adapters")
    decoder = ImageFeatureDecoder.from_pretrained(source, read_foundation(foundation))
    adapters = decoder.config.lora
    decoder.merge_lora().save_pretrained(target)
    size = sum(p.numel() for p in decoder.own_parameters().values()) / 1e6
    return f"read     {source}: {adapters}\nwritten  {target}: {size:.2f} M, the adapters merged into the language model"


def read_foundation(path: str) -> FoundationConfig:
    """As `fit` reads one: unknown keys are errors."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--foundation", type=FoundationConfig)
    return parser.instantiate_classes(parser.parse_args(["--foundation", path])).foundation
