"""One point of a sweep: a setting of MoMA generated, scored and logged to wandb; and a name for it."""

import re
from dataclasses import MISSING, asdict, fields
from hashlib import sha256

import wandb
from lightning.pytorch.utilities import rank_zero_only

from evaluation.config import EvalConfig
from evaluation.figures.grids import draw_grid
from evaluation.figures.scored import comparison
from evaluation.generation import generate
from evaluation.made_with import about_table
from evaluation.methods import Method, Moma
from evaluation.plan import Evaluation
from evaluation.scoring import score
from evaluation.shared_scoring import fill_caches
from evaluation.statistics import METRICS, summarise
from evaluation.tracking import wandb_run
from moma_lightning.files import write_json


def point_name(method: Moma) -> str:
    """`moma` and every option that is not its default: `moma_beta0.5`. Two settings never share a name, so neither do their pictures.

    Options that are words (paths, lists) are shortened to what a folder's name can hold, and end in a digest of what they were.
    """
    changed = {f.name: getattr(method, f.name) for f in fields(method) if f.default is not MISSING and getattr(method, f.name) != f.default}
    name = re.sub(r"[^\w.+-]+", "-", "_".join(["moma", *(f"{key}{value}" for key, value in changed.items())]))
    numbers = all(isinstance(value, (int, float)) for value in changed.values())
    return name if numbers else f"{name}-{sha256(repr(sorted(changed.items())).encode()).hexdigest()[:8]}"


def run_point(config: EvalConfig) -> dict:
    """Score `config.moma`, write `<run>/sweeps/<name>.json` and log one wandb run: settings as config, means as metrics, the picture grid. Under
    torchrun rank 0 scores and returns the summary."""
    name = point_name(config.moma)
    methods: dict[str, Method] = {name: config.moma}
    generate(config, methods)
    fill_caches(config, methods)
    if rank_zero_only.rank:
        return {}
    scores = score(Evaluation.open(config), methods)
    summary = summarise(scores)
    write_json(config.sweeps_folder / f"{name}.json", about_table(config, name, methods) | summary)
    if config.wandb.enabled:
        with wandb_run(config, config.sweeps_folder, "sweep", config.wandb.name or name, {"moma": asdict(config.moma)}) as run:
            run.log({metric: summary[name][metric]["mean"] for metric in METRICS if metric in summary[name]})
            if (grid := comparison(scores, config.report.subjects, config.report.prompts)) is not None:
                run.log({"pictures": wandb.Image(draw_grid(grid))})
    return summary
