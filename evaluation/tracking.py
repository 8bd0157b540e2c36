"""wandb logging of every table and figure; offline without a key, and it never asks for one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import wandb

from evaluation.config import EvalConfig
from evaluation.figures.ablations import read_ablations
from evaluation.figures.tables import Cells, difference_rows, metrics_in, named_rows, read_about, read_scores, read_summary
from evaluation.names import methods_of, metric_name
from evaluation.report.page import all_warnings
from moma_lightning.wandb_mode import wandb_mode, wandb_project


def log_evaluation(config: EvalConfig, figures: Sequence[Path]) -> None:
    """Log `eval/<method>/<metric>`, the tables of the last scoring and ablations, those of `figures` that are PNGs, and the report's grid.

    The run's config is what that scoring was made with, and the page's warnings: the files may hold other weights and settings by now.
    """
    if not config.wandb.enabled:
        return
    about = read_about(config)
    about |= {"adapter": config.adapter, "decoder": config.decoder, "warnings": all_warnings(config, about, read_scores(config))}
    with wandb_run(config, config.eval_folder, "evaluation", config.wandb.name, about) as run:
        run.log({**means(config), **tables(config), **images(config, figures)})


def wandb_run(config: EvalConfig, folder: Path, job_type: str, name: str | None, about: Mapping[str, Any]) -> wandb.Run:
    """A run in `<folder>/wandb` that is told the config's protocol, where `about` has no other, and `about`."""
    folder = folder / "wandb"
    folder.mkdir(parents=True, exist_ok=True)  # wandb falls back to a temporary folder where it is missing
    return wandb.init(
        project=config.wandb.project or wandb_project(), name=name, group=config.wandb.group, tags=config.wandb.tags, job_type=job_type,
        mode=wandb_mode(), dir=folder,
        config={"protocol": asdict(config.resolved_protocol()), **about}, settings=wandb.Settings(silent=True, console="off"),
    )


def means(config: EvalConfig) -> dict[str, float]:
    found = methods_of(read_summary(config))
    return {f"eval/{name}/{metric}": cell["mean"] for name, cells in found.items() for metric, cell in cells.items()}


def tables(config: EvalConfig) -> dict[str, wandb.Table]:
    """Scores, differences and each ablation, each number with the ends of its interval in columns of their own; and means by subject and by prompt."""
    summary = read_summary(config)
    rows = named_rows(summary)
    found = {"tables/scores": interval_table("Method", rows)}
    if differences := difference_rows(summary):
        found["tables/differences"] = interval_table("Difference", differences)
    for ablation in read_ablations(config):
        found[f"tables/ablation_{ablation.key}"] = interval_table("Setting", ablation.rows)
    for by in ("subject", "prompt"):
        means = pd.read_csv(config.eval_folder / f"per_{by}.csv").astype(object)
        found[f"tables/per_{by}"] = wandb.Table(columns=list(means), data=means.where(means.notna(), None).to_numpy().tolist())
    return found


def interval_table(first: str, rows: Mapping[str, Cells]) -> wandb.Table:
    metrics = metrics_in(*rows.values())
    ends = [(metric, end) for metric in metrics for end in ("mean", "lo", "hi")]
    titles = [metric_name(metric) if end == "mean" else f"{metric_name(metric)} {end}" for metric, end in ends]
    data: Sequence[list] = [[name, *(cells.get(metric, {}).get(end) for metric, end in ends)] for name, cells in rows.items()]
    return wandb.Table(columns=[first, *titles], data=data)


def images(config: EvalConfig, figures: Sequence[Path]) -> dict[str, wandb.Image]:
    paths = [*sorted(path for path in figures if path.suffix == ".png"), config.report_folder / "grid.png"]
    return {f"figures/{path.stem}": wandb.Image(str(path)) for path in paths if path.exists()}
