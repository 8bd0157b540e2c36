"""`python -m moma_lightning convert --from X --to Y`: adapters and decoders between the formats that can hold them."""

import argparse
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from moma_lightning.checkpoints.adapter import adapter_state, holds_subject, write_native
from moma_lightning.checkpoints.formats import (
    CheckpointError,
    State,
    ip_adapter_layout,
    read_adapter_file,
    released_layout,
    write_pickle,
    write_safetensors,
)
from moma_lightning.checkpoints.released_mllm import MLLM_TRAINED, read_mllm
from moma_lightning.hub import local_path
from moma_lightning.models.adapter import MoMAAdapter
from moma_lightning.models.mapping import Mapping
from moma_lightning.models.trained_weights import WEIGHTS, check_fit, read_config, read_tensors, write_folder

ADAPTER, DECODER = "adapter", "image_feature_decoder"
SIDES = {"image_proj": "projector", "ip_adapter": "context side", "subject_adapter": "subject side", "mapping": "mapping", "mllm": "MLLM", "token": "token"}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m moma_lightning convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="""formats, by name:
  <folder>        native: <folder>/adapter and, from a released file, <folder>/image_feature_decoder; read also as stage 2's folder alone
  *.th            the released MoMA file: projector, both sides and the decoder's mapping
  *.bin           IP-Adapter: projector and context side, as a pickle
  *.safetensors   IP-Adapter in safetensors (a source may be the native file)""")
    parser.add_argument("--from", dest="source", required=True, help="file, folder, or owner/name@revision/<file> on the hub")
    parser.add_argument("--to", dest="target", required=True, help="what to write; its name says the format")
    parser.add_argument("--decoder", help="image_feature_decoder folder whose mapping a .th target takes, where it is not in the source")
    parser.add_argument("--mllm", help="the released MLLM, a folder in LLaVA's original layout or its hub name: goes into the decoder's folder")
    parser.add_argument("--merge-lora", metavar="FOUNDATION", help="add the adapters of a decoder's folder to the MLLM of this YAML; --to is a folder")
    given = parser.parse_args(arguments)
    if given.merge_lora:
        if given.decoder or given.mllm:
            parser.error("--merge-lora takes a decoder's folder by --from, and neither --decoder nor --mllm")
        from moma_lightning.checkpoints.merge import merge_lora

        print(merge_lora(given.source, given.target, given.merge_lora))
        return
    print(convert(given.source, given.target, given.decoder, given.mllm))


def convert(source: str, target: str, decoder: str | None = None, mllm: str | None = None) -> str:
    """Convert, and return the report: what was read, what was written, and what the target's format cannot hold.

    Values and dtypes stay what they are. Raises CheckpointError for a source that cannot be read or that lacks what the target
    must hold, and for a target that would have to be computed (a paper-variant adapter as a released file).
    """
    path = Path(target)
    if path.suffix == ".th" and decoder is None and (beside := local_path(f"{source}/{DECODER}")) is not None:
        decoder = str(beside)
    elif path.suffix in (".pt", ".pth", ".ckpt"):
        raise CheckpointError(f"{target}: no format is called {path.suffix}; a folder, .th, .bin or .safetensors is")
    (state, variant), card = read_source(source), None
    if decoder is not None:
        trained, card = read_decoder(Path(decoder))
        state |= trained
    if mllm is not None:
        state, card = state | read_mllm(mllm), None
    write = {".th": write_released, ".bin": write_ip_adapter, ".safetensors": write_ip_adapter}.get(path.suffix)
    written = write(path, state, variant) if write else write_folders(path, state, variant, card)
    lost = {name: value for name, value in state.items() if name not in written}
    lines = [f"read     {source}: {summary(state)}", f"written  {target}: {summary(written)}"]
    if lost:
        lines.append(f"left out {summary(lost)}: the format of {path.name} does not hold them")
    if decoder is None and (beside := local_path(f"{source}/{DECODER}")) is not None:
        lines.append(f"left out {beside}: what is converted is the adapter")
    return "\n".join(lines)


def read_source(source: str) -> tuple[State, str]:
    """An adapter's entries under native names, and its variant.

    Raises CheckpointError for no plain IP-Adapter, and for one that is not whole up to its last layer: that it ends too early a base tells, which is not here.
    """
    state, metadata = read_adapter_file(local_path(f"{source}/{ADAPTER}") or source)
    if lacking := {"image_proj.proj.weight", "image_proj.norm.weight"} - state.keys():
        raise CheckpointError(f"{source} holds no {' and no '.join(sorted(lacking))}: not an IP-Adapter (the plain one) or MoMA adapter file")
    try:
        check_fit(source, state, whole_adapter(state))
    except ValueError as error:
        raise CheckpointError(f"{error}\nIt is not a whole adapter: fetch or write it again.") from error
    return state, metadata.get("moma_variant", "released")


def whole_adapter(state: State) -> State:
    """What an adapter of these widths and so many layers holds, on the meta device; subject side and mapping where `state` has something of them."""
    # Of to_k and to_v the former, which comes last here, says a layer's channels.
    channels = {tuple(name.split(".")[:2]): len(state[name]) for name in sorted(state, reverse=True) if state[name].ndim == 2}
    blocks = max(sum(layer[0] == side for layer in channels) for side in ("ip_adapter", "subject_adapter"))
    proj, text_dim = state["image_proj.proj.weight"], len(state["image_proj.norm.weight"])
    layers = {i: (channels.get(("ip_adapter" if i % 2 else "subject_adapter", str(i)), 1), text_dim if i % 2 else None) for i in range(2 * blocks)}
    with torch.device("meta"):
        whole = adapter_state(MoMAAdapter(layers, proj.shape[-1], text_dim, num_tokens=len(proj) // text_dim), subject=holds_subject(state))
        if (gate := state.get("mapping.gate_proj.weight")) is not None:
            whole |= nn.ModuleDict({"mapping": Mapping(gate.shape[-1], len(gate))}).state_dict()
    return whole


def read_decoder(folder: Path) -> tuple[State, dict]:
    """What an image-feature decoder trained, and its config.json. Raises CheckpointError for one that the released file cannot describe."""
    card = read_config(folder)
    options = card["decoder"]
    if options["template"] != "released" or options["learnable_token"]:
        raise CheckpointError(f"{folder}: its decoder uses the paper's template or a learnable token; the released file holds neither")
    return read_tensors(folder / WEIGHTS), card


def write_released(path: Path, state: State, variant: str) -> State:
    if variant != "released":
        raise CheckpointError(f"{path}: an adapter of the {variant} variant cannot be written as a released file: its W' stand in the frozen layer's place")
    require(path, state, "image_proj", "ip_adapter", "subject_adapter", "mapping")
    kept = {name: value for name, value in state.items() if not name.startswith("mllm.")}
    write_pickle(path, released_layout(kept))
    return kept


def write_ip_adapter(path: Path, state: State, variant: str) -> State:
    require(path, state, "image_proj", "ip_adapter")
    nested = ip_adapter_layout(state)
    kept = {f"{part}.{name}": value for part, entries in nested.items() for name, value in entries.items()}
    if path.suffix == ".bin":
        write_pickle(path, nested)
    else:
        write_safetensors(path, kept, {})
    return kept


def write_folders(path: Path, state: State, variant: str, card: dict | None = None) -> State:
    """Native: the adapter's folder, and the decoder's where there is a mapping; `card` is its config.json, None: the released one's."""
    require(path, state, "image_proj", "ip_adapter")
    decoder = {name: value for name, value in state.items() if name.partition(".")[0] in ("mapping", "mllm")}
    write_native(path / ADAPTER, {name: value for name, value in state.items() if name not in decoder}, variant)
    if decoder:
        require(path, state, "mapping")
        write_folder(path / DECODER, decoder, card or decoder_config(decoder))
    return state


def decoder_config(state: State) -> dict:
    """config.json of the released image-feature decoder: its template, and no token of its own."""
    trained = MLLM_TRAINED if any(name.startswith("mllm.") for name in state) else []
    embed_dim, hidden_size = state["mapping.gate_proj.weight"].shape
    options = {"template": "released", "learnable_token": False, "trainable": [*trained, r"^mapping\."]}
    return {"embed_dim": embed_dim, "hidden_size": hidden_size, "decoder": options}


def require(path: Path, state: State, *parts: str) -> None:
    have = {name.partition(".")[0] for name in state}
    if lacking := [SIDES[part] for part in parts if part not in have]:
        hint = " (the mapping: --decoder)" if "mapping" in lacking else ""
        raise CheckpointError(f"{path} must hold the {' and the '.join(lacking)}, which the source does not{hint}")


def summary(state: State) -> str:
    """Entries, parameters and dtypes by side."""
    lines = []
    for side, title in SIDES.items():
        values = [value for name, value in state.items() if name.partition(".")[0] == side]
        if values:
            dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in values)
            lines.append(f"{title} {sum(v.numel() for v in values) / 1e6:.2f} M ({len(values)} entries, {', '.join(dtypes)})")
    return "; ".join(lines)
