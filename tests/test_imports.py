"""What is asked for at once comes at once: no help text and no bare import waits for PyTorch."""

import subprocess
import sys

import pytest

from evaluation.__main__ import USAGE
from evaluation.cli import COMMANDS
from evaluation.commands import HELP

HEAVY = {"torch", "diffusers", "transformers", "lightning", "torchvision", "wandb", "jsonargparse", "numpy"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("code", [
    "import moma_lightning",
    "import evaluation",
    "import datamodules",
    "from moma_lightning.__main__ import main; main(['--help'])",
    "from evaluation.__main__ import main; main(['--help'])",
])
def test_nothing_heavy_is_imported(code):
    imported = python(f"{code}\nimport sys\nprint('imported', *sorted({HEAVY} & sys.modules.keys()))")
    assert imported.splitlines()[-1].split() == ["imported"]


def test_a_build_of_shards_brings_no_pytorch():
    """Its processes are many, and with PyTorch each takes half a gigabyte more."""
    imported = python(f"import datamodules.openimages.build, datamodules.mini.export\nimport sys\nprint(*sorted({HEAVY} & sys.modules.keys()))")
    assert imported.split() == ["numpy"]


def test_the_usage_of_evaluation_lists_every_command():
    listed = {line.split()[0]: " ".join(line.split()[1:]) for line in USAGE.splitlines() if line.startswith("  ")}
    assert listed == HELP and list(HELP) == list(COMMANDS)
