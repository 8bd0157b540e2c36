"""The mini foundation's recipe runs from nothing: each part takes one step on a few pictures, in a folder of its own, and what it made is checked."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
PARTS = """
import os
import sys
from importlib import import_module
for part, *options in (
    ("autoencoder", "--pictures", "32", "--batch", "2"),
    ("clip", "--pictures", "32", "--batch", "4"),
    ("dino", "--identities", "60"),
    ("sam", "--pictures", "32", "--batch", "2"),
    ("unet", "--pictures", "32", "--batch", "2"),
    ("unet", "--pictures", "32", "--batch", "2", "--second-round"),
    ("llava", "--pictures", "32", "--batch", "2"),
    ("style", "--pictures", "32", "--batch", "2"),
    ("views", "--pictures", "32", "--batch", "2"),
):
    sys.argv = [part, "--steps", "1", *options]
    import_module(f"experiments.mini.recipe.{part}").main()
for part, *options in (("ship",), ("check_encoders", f"{os.environ['MINI_WORK']}/reconstructions.png")):
    sys.argv = [part, *options]
    import_module(f"experiments.mini.recipe.{part}").main()
"""


def test_the_recipe_makes_folders_that_load(tmp_path):
    made = tmp_path / "foundation"
    environment = os.environ | {"MINI_WORK": str(tmp_path / "work"), "MINI_FOUNDATION": str(made), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", PARTS], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "'same label and colour': {'R@1': " in ended.stdout and "zero-shot {'category': " in ended.stdout
    assert Image.open(tmp_path / "work/reconstructions.png").size == (8 * 64 * 2, 2 * 64 * 2)
    shipped = json.loads((ROOT / "experiments/mini/foundation/manifest.json").read_text())["files"]
    new = json.loads((made / "manifest.json").read_text())["files"]
    absent = {name for name in shipped if name not in new}
    assert {name.split("/")[0] for name in absent} <= {"ip_adapter", "moma"}
    weights = [name for name in new if name.endswith(".safetensors")]
    # The safetensors header may differ by a little; the tensors may not.
    assert not [name for name in weights if abs(new[name]["bytes"] - shipped[name]["bytes"]) > 8192]


def test_the_manifest_is_that_of_the_shipped_files():
    folder = ROOT / "experiments/mini/foundation"
    manifest = json.loads((folder / "manifest.json").read_text())
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"}
    assert there == set(manifest["files"])
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"], name
    assert manifest["bytes"] < 32 * 2**20
