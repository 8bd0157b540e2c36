"""A MoMAAdapter to and from files: the project's own folder (safetensors + JSON card), or any layout of `formats`.

The native file's `image_proj.` and `ip_adapter.` entries are IP-Adapter's layout, so the context side is a valid IP-Adapter file.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from diffusers import UNet2DConditionModel
from torch import Tensor

from moma_lightning.checkpoints.formats import ADAPTER_FILE, CheckpointError, State, read_adapter_file, write_safetensors
from moma_lightning.files import write_json
from moma_lightning.models.adapter import MoMAAdapter, Variant
from moma_lightning.models.trained_weights import check_fit

logger = logging.getLogger(__name__)

CARD_FILE = "card.json"
_PARTS = {"image_proj": "image_proj", "context": "ip_adapter", "subject": "subject_adapter"}


def adapter_state(adapter: MoMAAdapter, *, subject: bool = True) -> State:
    """The adapter's parameters under the file's names; without the subject side it is an IP-Adapter file's content."""
    state = {}
    for name, value in adapter.state_dict().items():
        part, _, rest = name.partition(".")
        if subject or part != "subject":
            state[f"{_PARTS[part]}.{rest}"] = value.detach()
    return state


def save_adapter(adapter: MoMAAdapter, folder: str | Path, card: dict[str, Any] | None = None) -> Path:
    """Write `moma.safetensors`, with the subject side where the adapter has one, and `card.json` into `folder`, each beside and renamed.

    Returns the weights' path.
    """
    told = ({} if adapter.trained_on is None else {"context": adapter.trained_on}) | (card or {})
    return write_native(Path(folder), adapter_state(adapter, subject=adapter.has_subject), adapter.variant, told)


def write_native(folder: Path, state: Mapping[str, Tensor], variant: str, card: dict[str, Any] | None = None) -> Path:
    """The native folder of entries under native names."""
    subject = holds_subject(state)
    num_tokens = len(state["image_proj.proj.weight"]) // len(state["image_proj.norm.weight"])
    written: dict[str, Any] = {"variant": variant, "num_tokens": num_tokens, "subject": subject} | (card or {})
    metadata = {"moma_variant": variant} | ({"moma_context": written["context"]} if "context" in written else {})
    write_safetensors(folder / ADAPTER_FILE, state, metadata)
    write_json(folder / CARD_FILE, written, indent=2)
    return folder / ADAPTER_FILE


def load_adapter(path: str | Path, unet: UNet2DConditionModel, variant: Variant | None = None) -> MoMAAdapter:
    """The adapter in `path` for this UNet. A file without a subject side (an IP-Adapter) leaves lambda at 0.

    variant: overrides what the file says; files that say nothing are "released". A released file's `llm_mapping` is the
    image-feature decoder's and is passed over. Raises CheckpointError as `load_into`.
    """
    state, metadata = read_adapter_file(path)
    state = {name: value for name, value in state.items() if not name.startswith("mapping.")}
    weight = state.get("image_proj.proj.weight")
    if weight is None:
        raise CheckpointError(f"{path} holds no image_proj.proj.weight: not an IP-Adapter (the plain one) or MoMA adapter file")
    num_tokens = max(1, weight.shape[0] // unet.config.cross_attention_dim)
    variant = variant or cast(Variant, metadata.get("moma_variant", "released"))
    adapter = MoMAAdapter.for_unet(unet, weight.shape[1], num_tokens=num_tokens, variant=variant)
    load_into(adapter, state, path)
    adapter.has_subject, adapter.trained_on = holds_subject(state), metadata.get("moma_context")
    return adapter


def holds_subject(names: Iterable[str]) -> bool:
    """Whether a file's entries have the subject side among them."""
    return any(name.startswith("subject_adapter.") for name in names)


def load_into(adapter: MoMAAdapter, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Strictly copy file entries into an adapter, in its own dtype; only the whole subject side may be absent.

    Logs what was read. Raises CheckpointError that lists missing, unexpected and wrongly shaped entries by name.
    """
    if spoilt := [name for name, value in state.items() if not value.is_meta and not value.isfinite().all()]:
        raise CheckpointError(f"{path}: {', '.join(spoilt[:5])} hold values that are not finite: its training has failed, or the file is damaged")
    expected = adapter_state(adapter, subject=holds_subject(state))
    try:
        logger.info("%s", check_fit(str(path), state, expected))
    except ValueError as error:
        raise CheckpointError(f"{error}\nUse the base model that the adapter was trained on.") from error
    for name, parameter in expected.items():  # which share the adapter's memory
        parameter.copy_(state[name])
