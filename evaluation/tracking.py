"""wandb logging of the score table and the picture grid; offline without a key, and it never asks for one."""

import json
import os
from dataclasses import asdict
from typing import Any

import wandb

from evaluation.config import EvalConfig
from evaluation.statistics import METRICS


def mode() -> Any:
    """WANDB_MODE where it is set; else online only with WANDB_API_KEY."""
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def log_evaluation(config: EvalConfig) -> None:
    """Log `eval/<method>/<metric>`, the table and the grid of the last scoring and report."""
    if not config.wandb.enabled:
        return
    summary = json.loads((config.eval_folder / "summary.json").read_text())
    methods = {name: metrics for name, metrics in summary.items() if name != "differences"}
    folder = config.eval_folder / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    with wandb.init(
        project=config.wandb.project,
        name=config.wandb.name,
        job_type="evaluation",
        mode=mode(),
        dir=folder,
        config={"protocol": asdict(config.resolved_protocol()), "adapter": config.adapter, "decoder": config.decoder},
        settings=wandb.Settings(silent=True, console="off"),
    ) as run:
        rows = [[name, *(metrics.get(m, {}).get("mean") for m in METRICS)] for name, metrics in methods.items()]
        run.log({"eval/table": wandb.Table(columns=["method", *METRICS], data=rows)})
        run.log(
            {f"eval/{name}/{metric}": value["mean"] for name, metrics in methods.items() for metric, value in metrics.items()}
        )
        grid = config.report_folder / "grid.png"
        if grid.exists():
            run.log({"eval/grid": wandb.Image(str(grid))})
