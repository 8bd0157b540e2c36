"""The released MoMA's multimodal LLM: a LLaVA-1.5-7B in its authors' layout, under the names of transformers' LlavaModel."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from moma_lightning.checkpoints.formats import CheckpointError, State, read_pickle
from moma_lightning.hub import find_snapshot

#: What of the MLLM the released weights replace; the vision tower stayed frozen and is the foundation's own.
MLLM_TRAINED = [r"^mllm\.language_model\.", r"^mllm\.multi_modal_projector\."]
#: transformers' LLaVA-1.5 has 64 rows more than Vicuna's 32,000: the image token, a pad token, and rows to round up.
ADDED_ROWS = 64
RENAMED = [
    (r"^model\.(embed_tokens|layers|norm)\.", r"mllm.language_model.\1."),
    (r"^model\.mm_projector\.0\.", "mllm.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "mllm.multi_modal_projector.linear_2."),
]
#: The language-model head is not used; the vision tower was not trained; rotary frequencies are computed.
PASSED_OVER = r"^lm_head\.|^model\.vision_tower\.|\.rotary_emb\.inv_freq$"


def read_mllm(source: str) -> State:
    """Language model and projector of a folder or hub name, as the image-feature decoder's `mllm.*`.

    The embedding gets zeros in the added rows: the image token's is never looked up, and padding is masked. Raises
    CheckpointError for entries that LLaVA-1.5's own layout does not have.
    """
    folder = find_snapshot(source, ["pytorch_model*", "model*.safetensors*"])
    state: State = {}
    for path in weight_files(folder):
        entries = load_file(path) if path.suffix == ".safetensors" else read_pickle(path)
        for name, value in entries.items():
            if not re.search(PASSED_OVER, name):
                state[renamed(name, path)] = value
    embedding = state.get("mllm.language_model.embed_tokens.weight")
    if embedding is None:
        raise CheckpointError(f"{folder} holds no model.embed_tokens.weight: not a LLaVA in its authors' layout")
    state["mllm.language_model.embed_tokens.weight"] = torch.cat([embedding, embedding.new_zeros(ADDED_ROWS, embedding.shape[1])])
    return state


def renamed(name: str, path: Path) -> str:
    for pattern, replacement in RENAMED:
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name)
    raise CheckpointError(f"{path}: unexpected entry {name}; a LLaVA-1.5 in its authors' layout has model.layers.*, model.mm_projector.{{0,2}}.*")


def weight_files(folder: Path) -> list[Path]:
    """The shards that the index names, or the one file; safetensors where there are any."""
    for kind in ("model.safetensors", "pytorch_model.bin"):
        if (folder / f"{kind}.index.json").is_file():
            names = json.loads((folder / f"{kind}.index.json").read_text())["weight_map"].values()
            found = [folder / name for name in sorted(set(names)) if "mm_projector.bin" not in name]
            if lacking := [path.name for path in found if not path.is_file()]:
                raise CheckpointError(f"{folder} lacks {', '.join(lacking)}, which its index names: fetch it again")
            return found
        if (folder / kind).is_file():
            return [folder / kind]
    raise CheckpointError(f"{folder} holds neither model.safetensors nor pytorch_model.bin, nor an index of shards")
