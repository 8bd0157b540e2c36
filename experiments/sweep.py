"""Runs a wandb sweep file: on the server with a key, else its grid on this machine, offline, ending in the same table.

`python -m experiments.sweep experiments/sweeps/beta.yaml [arguments of every point]`. An interrupted grid goes on with the pictures that
are there, and scores and logs every point again. Offline points are wandb runs too: `wandb sync` sends them later, of an interrupted grid
the last one of each point.
"""

import argparse
import itertools
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import wandb
import yaml

from evaluation.ablations import run_ablation
from evaluation.cli import main as evaluation
from evaluation.cli import parse
from evaluation.config import AblationConfig
from evaluation.methods import Method
from evaluation.sweeps import point_name
from moma_lightning.wandb_mode import wandb_mode, wandb_project


def read(path: Path) -> dict[str, Any]:
    """A sweep file. Raises ValueError for one that is no grid over listed values or does not run `evaluation point`."""
    sweep = {"name": path.stem} | yaml.safe_load(path.read_text())
    if sweep.get("method") != "grid" or not all({"values", "value"} & set(p) for p in sweep["parameters"].values()):
        raise ValueError(f"{path}: only `method: grid` over `values` runs without a server; with a key wandb runs the others")
    if sweep["command"][2:5] != ["-m", "evaluation", "point"]:
        raise ValueError(f"{path}: its command must be `${{env}} ${{interpreter}} -m evaluation point ...`")
    if other := [key for key in sweep["parameters"] if not key.startswith("moma.")]:
        raise ValueError(f"{path}: the grid's table tells settings of MoMA apart (`moma.<option>`), not {', '.join(other)}")
    return sweep


#: The paper's table of an option that alone is swept.
PUBLISHED: dict[tuple[str, ...], Literal["beta", "masking"]] = {("moma.beta",): "beta", ("moma.mask_strength",): "masking"}


def points(sweep: dict[str, Any], extra: list[str]) -> Iterator[list[str]]:
    """The arguments of `evaluation` at each point of the grid, in wandb's form `--key=value`."""
    parameters = {key: p.get("values", [p.get("value")]) for key, p in sweep["parameters"].items()}
    for values in itertools.product(*parameters.values()):
        args = [f"--{key}={'null' if value is None else value}" for key, value in zip(parameters, values, strict=True)]
        yield [part for word in sweep["command"][4:] for part in (args if word == "${args}" else [word])] + extra


def run_grid(sweep: dict[str, Any], extra: list[str]) -> None:
    """Every point in turn, then the table of all of them."""
    for arguments in points(sweep, extra):
        evaluation(arguments)
    write_table(sweep, extra)


def write_table(sweep: dict[str, Any], extra: list[str]) -> None:
    """`<run>/ablations/<name>.{json,md}` of a grid's points; pictures that are not there yet are made."""
    commands = list(points(sweep, extra))
    configs = [parse(arguments)[1] for arguments in commands]
    config = configs[0]
    methods: dict[str, Method] = {point_name(c.moma): c.moma for c in configs}
    config.ablation = AblationConfig(sweep["name"], f"Sweep {sweep['name']}", methods, PUBLISHED.get(tuple(sweep["parameters"])))
    run_ablation(config)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("sweep", type=Path, help="a wandb sweep file; what follows it goes to every point's `evaluation point`")
    given, extra = parser.parse_known_args()
    path = given.sweep
    if wandb_mode() == "online":
        sweep, table = yaml.safe_load(path.read_text()), None
        try:
            table = read(path)
        except ValueError as error:
            logging.info("wandb runs this sweep, and no table is made of it: %s", error)
        sweep["command"] += extra
        project = sweep.get("project") or wandb_project()
        subprocess.run(["wandb", "agent", "--project", project, wandb.sweep(sweep, project=project)], check=True)
        if table is not None:
            logging.info("the sweep's agent has ended; the table of its points, whose missing pictures are made here:")
            write_table(table, extra)
    else:
        run_grid(read(path), extra)


if __name__ == "__main__":
    main()
