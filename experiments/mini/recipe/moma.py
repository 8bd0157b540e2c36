"""The trained MoMA that is shipped: what `make data stage1 stage2` left in runs/mini, or another run's. Check: tests/test_trends.py."""

import argparse
import shutil

from experiments.mini.recipe.common import FOUNDATION

PARTS = {"stage1/image_feature_decoder": "image_feature_decoder", "stage2/adapter": "adapter"}


def main():
    """Raises FileNotFoundError where a stage has not been trained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="runs/mini")
    run = parser.parse_args().run
    for source, name in PARTS.items():
        shutil.copytree(f"{run}/{source}", FOUNDATION / "moma" / name, ignore=shutil.ignore_patterns("README.md"), dirs_exist_ok=True)


if __name__ == "__main__":
    main()
