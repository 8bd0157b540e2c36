"""What is shipped of the mini foundation: every weight file in fp16 (loaded as fp32), and `manifest.json` over all of it."""

import datetime
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from experiments.mini.recipe.common import FOUNDATION
from moma_lightning.files import write_beside, write_json

#: The part of the recipe that makes each folder.
RECIPES = {"base/vae": "autoencoder", "base/unet": "unet", "base/text_encoder": "clip", "base/tokenizer": "clip", "base/scheduler": "unet",
           "clip": "clip", "image_encoder": "clip", "dino": "dino", "sam": "sam", "llava": "llava", "ip_adapter": "ip_adapter", "moma": "moma",
           "loras/pastel": "style", "loras/views": "views"}


def halve(path: Path) -> None:
    """fp32 weights to fp16 in place; whole numbers stay."""
    state = load_file(path)
    if any(v.dtype == torch.float32 for v in state.values()):
        half = {name: v.half() if v.dtype == torch.float32 else v for name, v in state.items()}
        write_beside(path, lambda p: save_file(half, p, metadata={"format": "pt"}))


def load_as_fp32(path: Path) -> None:
    """transformers would load a file's own precision: its config asks for fp32."""
    config = json.loads(path.read_text())
    for part in [config, *(v for v in config.values() if isinstance(v, dict))]:
        if "dtype" in part:
            part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def manifest() -> dict:
    files = {}
    for path in sorted(FOUNDATION.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            name = path.relative_to(FOUNDATION).as_posix()
            recipe = next((r for folder, r in RECIPES.items() if name.startswith((folder + "/", folder + "."))), None)
            files[name] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size,
                           "recipe": recipe and f"python -m experiments.mini.recipe.{recipe}"}
    return {"date": datetime.date.today().isoformat(), "bytes": sum(f["bytes"] for f in files.values()), "files": files}


def main():
    for path in FOUNDATION.rglob("*.safetensors"):
        halve(path)
    for path in FOUNDATION.rglob("config.json"):
        load_as_fp32(path)
    content = manifest()
    write_json(FOUNDATION / "manifest.json", content)
    print(f"{content['bytes'] / 2**20:.1f} MiB in {len(content['files'])} files")


if __name__ == "__main__":
    main()
