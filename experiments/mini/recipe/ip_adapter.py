"""Mini IP-Adapter: stage 2's own module and shards with `experiments/mini/ip_adapter.yaml`. Check: its pictures in runs/mini/ip_adapter."""

import shutil
import subprocess
import sys

from experiments.mini.recipe.common import FOUNDATION
from moma_lightning.files import write_beside

RUN = "runs/mini/ip_adapter"


def main():
    """Arguments are the command line's of `moma_lightning fit`. Shards are made where they are missing."""
    subprocess.run([sys.executable, "-m", "datamodules.mini", "--out", "runs/mini/data"], check=True)
    subprocess.run([sys.executable, "-m", "moma_lightning", "fit", "--config", "experiments/mini/ip_adapter.yaml", *sys.argv[1:]], check=True)
    write_beside(FOUNDATION / "ip_adapter" / "ip-adapter.safetensors", lambda p: shutil.copy(f"{RUN}/adapter/moma.safetensors", p))


if __name__ == "__main__":
    main()
