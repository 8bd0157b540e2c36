"""The layouts that adapter files come in, all read into one: a flat dict under the native file's names.

native, `.safetensors`: `image_proj.*`, `ip_adapter.<layer>.to_{k,v}_ip.weight`, `subject_adapter.<layer>.{to_k.weight,to_v.weight,lambda_}`.
IP-Adapter: the first two; flat in `.safetensors`, `{"image_proj": ..., "ip_adapter": ...}` in `.bin`.
released MoMA (`attn_adapters_projectors.th`, a pickle): `projectors`, `self_cross_attentions` (even layers self, odd cross) and
`llm_mapping`, the image-feature decoder's mapping; here `mapping.{gate,up,down}_proj.weight`.
<layer> is the position in `unet.attn_processors` (down, up, mid) in all of them.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moma_lightning.files import write_beside
from moma_lightning.hub import find_file, hub_name, local_path

State = dict[str, Tensor]
ADAPTER_FILE = "moma.safetensors"
IP_ADAPTER_PARTS = ("image_proj", "ip_adapter")
RELEASED_PARTS = ("projectors", "self_cross_attentions", "llm_mapping")
_SUBJECT_NAMES = {"to_k_ip.weight": "to_k.weight", "to_v_ip.weight": "to_v.weight", "scale_learnable": "lambda_"}
#: Of Lightning's checkpoints, which are taken for adapters.
UNFINISHED = ("is a training's checkpoint, not what it exports: the same `fit` with --trainer.max_steps at the checkpoint's step writes the adapter's folder, "
              "and with more steps goes on from there")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the entries and what to do."""



def read_adapter_file(path: str | Path) -> tuple[State, dict[str, str]]:
    """Entries under the native names, and the file's metadata. `path`: a file or a native folder, here or on the hub.

    Pickles are read with `weights_only=True`. Raises CheckpointError for a damaged file, a pickle that holds anything but
    tensors, or a layout that is none of the above.
    """
    path = local_path(str(path)) or Path(path)
    if path.is_dir():
        path = path / ADAPTER_FILE
    if not path.exists() and "@" in str(path):
        inside = hub_name(str(path)).path
        path = find_file(str(path), None if inside and Path(inside).suffix else ADAPTER_FILE)
    if (path.parent / ".metadata").exists() and not path.exists():  # torch.distributed.checkpoint's
        raise CheckpointError(f"{path.parent} {UNFINISHED}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no adapter there; stage 2 writes runs/<EXP>/stage2/adapter/{ADAPTER_FILE}, and a hub name needs its revision "
                                "(owner/name@main)")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return flatten(read_pickle(path), path), {}


def _read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
        return load_file(path), metadata
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); fetch or write it again") from error


def read_pickle(path: Path) -> Any:
    """A pickle's tensors and plain containers; memory-mapped where the file's format allows it."""
    try:
        with path.open("rb") as stream:
            zipped = stream.read(2) == b"PK"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        found = next((word.strip("`,.:") for line in str(error).splitlines() if "GLOBAL" in line for word in line.split() if "." in word), "")
        raise CheckpointError(
            f"{path} was refused: a pickle of more than tensors{f' ({found})' if found else ''} can run code when it is read, or it is damaged. "
            "Get it from its authors again, or as safetensors"
        ) from error
    except (EOFError, RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint ({' '.join(str(error).split())[:200] or 'empty'}); fetch or write it again") from error


def flatten(nested: Any, path: Path) -> State:
    """A pickle's content under the native names; names that no layout knows are kept, so that strict loading reports them."""
    parts = set(nested) if isinstance(nested, dict) else set()
    known = next((layout for layout in (IP_ADAPTER_PARTS, RELEASED_PARTS) if set(layout) & parts), None)
    if "pytorch-lightning_version" in parts:
        raise CheckpointError(f"{path} {UNFINISHED}")
    if known is None or parts != set(known):
        expected = " or ".join(", ".join(layout) for layout in (IP_ADAPTER_PARTS, RELEASED_PARTS))
        raise CheckpointError(f"{path} holds {', '.join(sorted(map(str, parts))) or 'no dict'}; expected {expected}")
    if wrong := [part for part in known if not isinstance(nested[part], dict)]:
        raise CheckpointError(f"{path}: {', '.join(wrong)} hold no entries")
    flat = {f"{part}.{name}": value for part in known for name, value in nested[part].items()}
    if wrong := [name for name, value in flat.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{path}: {', '.join(wrong[:5])} hold no tensors")
    return {native_name(name): value for name, value in flat.items()}


def native_name(name: str) -> str:
    """The native name of an entry of the released file; other names are left as they are."""
    part, _, rest = name.partition(".")
    layer, _, parameter = rest.partition(".")
    if part == "projectors":
        return f"image_proj.{rest}"
    if part == "llm_mapping":
        return rest
    if part == "self_cross_attentions" and layer.isdigit():
        if int(layer) % 2:
            return f"ip_adapter.{rest}"
        return f"subject_adapter.{layer}.{_SUBJECT_NAMES.get(parameter, parameter)}"
    return name


def released_layout(state: Mapping[str, Tensor]) -> dict[str, State]:
    """The released file's nested dict of native entries: the inverse of `flatten`."""
    nested: dict[str, State] = {part: {} for part in RELEASED_PARTS}
    back = {native: released for released, native in _SUBJECT_NAMES.items()}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        layer, _, parameter = rest.partition(".")
        if part == "image_proj":
            nested["projectors"][rest] = value
        elif part == "mapping":
            nested["llm_mapping"][name] = value
        else:
            nested["self_cross_attentions"][f"{layer}.{back[parameter] if part == 'subject_adapter' else parameter}"] = value
    return nested


def ip_adapter_layout(state: Mapping[str, Tensor]) -> dict[str, State]:
    """IP-Adapter's nested dict of the entries that it can hold: projector and context side."""
    return {part: {n.removeprefix(f"{part}."): v for n, v in state.items() if n.startswith(f"{part}.")} for part in IP_ADAPTER_PARTS}


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_beside(path, lambda beside: save_file(tensors, beside, metadata={"format": "pt"} | metadata))


def write_pickle(path: Path, nested: dict[str, State]) -> None:
    """Each tensor as one of its own: views would bring the storage of the whole file with them."""
    tensors = {part: {name: value.detach().cpu().clone() for name, value in entries.items()} for part, entries in nested.items()}
    write_beside(path, lambda beside: torch.save(tensors, beside))
