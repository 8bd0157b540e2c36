"""Adapter files: the project's own (safetensors + JSON card) and IP-Adapter's `.safetensors` and `.bin`.

Our file's `image_proj.` and `ip_adapter.` entries are IP-Adapter's layout, so the context side is a valid IP-Adapter file.
"""

import json
import pickle
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moma_lightning.files import write_beside
from moma_lightning.hub import find_file
from moma_lightning.models.adapter import MoMAAdapter, Variant
from moma_lightning.models.trained_weights import check_fit

ADAPTER_FILE = "moma.safetensors"
CARD_FILE = "card.json"
_PARTS = {"image_proj": "image_proj", "context": "ip_adapter", "subject": "subject_adapter"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the entries and what to do."""


def adapter_state(adapter: MoMAAdapter, *, subject: bool = True) -> dict[str, Tensor]:
    """The adapter's parameters under the file's names; without the subject side it is an IP-Adapter file's content."""
    state = {}
    for name, value in adapter.state_dict().items():
        part, _, rest = name.partition(".")
        if subject or part != "subject":
            state[f"{_PARTS[part]}.{rest}"] = value.detach().cpu().contiguous()
    return state


def save_adapter(adapter: MoMAAdapter, folder: str | Path, card: dict[str, Any] | None = None, *, subject: bool = True) -> Path:
    """Write `moma.safetensors` and `card.json` into `folder`, each beside and renamed. Returns the weights' path."""
    folder = Path(folder)
    card = {"variant": adapter.variant, "num_tokens": adapter.image_proj.num_tokens, "subject": subject} | (card or {})
    metadata = {"format": "pt", "moma_variant": adapter.variant}
    write_beside(folder / ADAPTER_FILE, lambda p: save_file(adapter_state(adapter, subject=subject), p, metadata=metadata))
    write_beside(folder / CARD_FILE, lambda p: p.write_text(json.dumps(card, indent=2) + "\n"))
    return folder / ADAPTER_FILE


def read_adapter_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Entries under the names of `adapter_state`, and the file's metadata. Pickles are read with `weights_only=True`.

    Raises CheckpointError for a damaged file, or a pickle that holds anything but tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = path / ADAPTER_FILE
    if not path.exists() and "@" in str(path):
        path = find_file(str(path))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no adapter there; stage 2 writes runs/<EXP>/stage2/adapter/{ADAPTER_FILE}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = dict(file.metadata() or {})
            return load_file(path), metadata
        nested = torch.load(path, map_location="cpu", weights_only=True)
        return {f"{part}.{name}": value for part, entries in nested.items() for name, value in entries.items()}, {}
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable adapter file ({error}); fetch or write it again") from error


def load_adapter(path: str | Path, unet: UNet2DConditionModel, variant: Variant | None = None) -> MoMAAdapter:
    """The adapter in `path` for this UNet. A file without a subject side (an IP-Adapter) leaves lambda at 0.

    variant: overrides what the file says; files that say nothing are "released". Raises CheckpointError as `load_into`.
    """
    state, metadata = read_adapter_file(path)
    weight = state.get("image_proj.proj.weight")
    if weight is None:
        raise CheckpointError(f"{path} holds no image_proj.proj.weight: not an IP-Adapter or MoMA adapter file")
    num_tokens = max(1, weight.shape[0] // unet.config.cross_attention_dim)
    variant = variant or cast(Variant, metadata.get("moma_variant", "released"))
    adapter = MoMAAdapter.for_unet(unet, weight.shape[1], num_tokens=num_tokens, variant=variant)
    load_into(adapter, state, path)
    return adapter


def load_into(adapter: MoMAAdapter, state: dict[str, Tensor], path: str | Path) -> None:
    """Strictly copy file entries into an adapter; only the whole subject side may be absent.

    Raises CheckpointError that lists missing, unexpected and wrongly shaped entries by name.
    """
    has_subject = any(name.startswith("subject_adapter.") for name in state)
    expected = adapter_state(adapter, subject=has_subject)
    try:
        check_fit(str(path), state, expected)
    except ValueError as error:
        raise CheckpointError(f"{error}\nUse the base model that the adapter was trained on.") from error
    own = {value: key for key, value in _PARTS.items()}
    named = {f"{own[n.partition('.')[0]]}.{n.partition('.')[2]}": v for n, v in state.items()}
    adapter.load_state_dict({n: v.float() for n, v in named.items()}, strict=has_subject)
