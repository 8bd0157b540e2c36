"""Do the parts belong together? Told from their widths, with their names, before gigabytes are loaded."""

from collections.abc import Mapping
from pathlib import Path

from moma_lightning.foundation import FoundationConfig, mllm_width
from moma_lightning.hub import find_folder
from moma_lightning.models.trained_weights import CONFIG, WEIGHTS, read_config


def check_hidden_size(folder: Path, hidden_size: int | None, foundation: FoundationConfig) -> None:
    """ValueError where a decoder was trained on an MLLM of another width than the foundation's."""
    width = mllm_width(foundation)
    if hidden_size is not None and hidden_size != width:
        raise ValueError(f"{folder}: its mapping reads hidden states of {hidden_size}, the MLLM {foundation.mllm} has {width}: "
                         "set foundation.mllm to the one that stage 1 trained")


def decoder_embed_dim(folder: str | Path) -> int:
    """Width of the image embeddings that a decoder's folder, here or on the hub, predicts."""
    return read_config(find_folder(str(folder), [WEIGHTS, CONFIG]))["embed_dim"]


def check_embed_dims(widths: Mapping[str, int]) -> None:
    """ValueError that names two parts whose image embeddings differ in width; `widths` by the part's name."""
    (first, expected), *others = widths.items()
    for part, width in others:
        if width != expected:
            raise ValueError(f"{first} has image embeddings of {expected} numbers, {part} of {width}: they were made for different image encoders. "
                             "Name a foundation.image_encoder, a decoder and an adapter that were trained together")
