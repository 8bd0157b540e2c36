"""report/index.html: tables with intervals, picture grids, training curves and ablations in one file."""

import io
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from evaluation import published
from evaluation.config import EvalConfig
from evaluation.report.pictures import Row, as_data, choose_rows, draw_grid
from evaluation.report.svg import COLORS, interval_chart, line_chart
from evaluation.stamps import write_beside
from evaluation.statistics import LEVEL, METRICS, by_subject
from evaluation.tables import TITLES

CURVES = ("train/loss", "val/")


def write_report(config: EvalConfig) -> Path:
    """Write report/index.html and report/grid.png from what `score` left. Raises FileNotFoundError before that."""
    scores_path = config.eval_folder / "scores.parquet"
    if not scores_path.exists():
        raise FileNotFoundError(f"{scores_path} is missing: run `python -m evaluation dreambooth` with the same config first")
    scores = pd.read_parquet(scores_path)
    rows = choose_rows(scores, config.report.subjects, config.report.prompts)
    if rows:
        buffer = io.BytesIO()
        draw_grid(rows).save(buffer, format="PNG")
        write_beside(config.report_folder / "grid.png", buffer.getvalue())
    path = config.report_folder / "index.html"
    write_beside(path, render(context(config, scores, rows)).encode())
    return path


def render(values: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("evaluation.report", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(values)


def context(config: EvalConfig, scores: pd.DataFrame, rows: list[Row]) -> dict[str, Any]:
    summary = json.loads((config.eval_folder / "summary.json").read_text())
    about = json.loads((config.eval_folder / "protocol.json").read_text())
    embed(rows, config.report.pixels)
    return {
        "title": config.report.title,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "about": about,
        "subjects": scores["subject"].nunique(),
        "pictures": len(scores),
        "level": f"{LEVEL:.0%}",
        "titles": TITLES,
        "headline": cells_of(summary),
        "charts": headline_charts(summary),
        "differences": difference_rows(summary),
        "per_subject": {metric: subject_table(scores, metric) for metric in METRICS},
        "rows": rows,
        "curves": training_curves(Path(config.run)),
        "ablations": ablation_tables(config.ablations_folder),
        "published": published.TABLE_1,
        "published_note": published.NOTE,
    }


def embed(rows: list[Row], pixels: int) -> None:
    """Put every picture of the grid into the page, each file once."""
    known: dict[Path, str] = {}
    for row in rows:
        for cell in row.cells:
            cell.data = known.setdefault(cell.path, known.get(cell.path) or as_data(cell.path, pixels))


def cells_of(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the headline table; the best generated method of each metric is marked."""
    methods = {name: metrics for name, metrics in summary.items() if name != "differences"}
    generated = {name: metrics for name, metrics in methods.items() if "clip_t_context" in metrics or "clip_t_texture" in metrics}
    best = {m: max((metrics[m]["mean"] for metrics in generated.values() if m in metrics), default=None) for m in METRICS}
    return [
        {
            "name": name,
            "cells": [
                metrics.get(m) and metrics[m] | {"best": name in generated and metrics[m]["mean"] == best[m]} for m in METRICS
            ],
        }
        for name, metrics in methods.items()
    ]


def headline_charts(summary: dict[str, Any]) -> list[str]:
    """A chart a metric; a method has one colour in all of them."""
    methods = {name: metrics for name, metrics in summary.items() if name != "differences"}
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(methods)}
    rows = {m: [(name, metrics[m], colors[name]) for name, metrics in methods.items() if m in metrics] for m in METRICS}
    return [interval_chart(TITLES[m], found) for m, found in rows.items() if found]


def difference_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for row in summary["differences"]:
        pairs.setdefault((row["a"], row["b"]), {})[row["metric"]] = row | {"certain": row["lo"] > 0 or row["hi"] < 0}
    return [{"a": a, "b": b, "cells": [found.get(m) for m in METRICS]} for (a, b), found in pairs.items()]


def subject_table(scores: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Methods as columns, subjects as rows, the mean over the subject's pictures in each cell."""
    columns = {}
    for method in dict.fromkeys(scores["method"]):
        table = by_subject(scores, method, metric)
        if not table.empty:
            columns[method] = table["sum"] / table["count"]
    frame = pd.DataFrame(columns)
    labels = scores.groupby("subject")["label"].first()
    rows = [
        (name, labels[name], [None if math.isnan(v) else v for v in row])
        for name, row in zip(frame.index, frame.to_numpy().tolist(), strict=True)
    ]
    return {"methods": list(columns), "rows": rows}


def training_curves(run: Path) -> dict[str, list[str]]:
    """Curves of each stage's newest metrics.csv (Lightning's CSVLogger), losses and validation values."""
    found = {}
    for stage in sorted(p for p in run.glob("stage*") if p.is_dir()):
        files = sorted(stage.rglob("metrics.csv"), key=lambda p: p.stat().st_mtime)
        charts = stage_charts(pd.read_csv(files[-1])) if files else []
        if charts:
            found[stage.name] = charts
    return found


def stage_charts(table: pd.DataFrame) -> list[str]:
    if "step" not in table:
        return []
    charts = []
    for name in (column for column in table.columns if column.startswith(CURVES)):
        points = table[["step", name]].apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan).dropna()
        if len(points) > 1:
            charts.append(line_chart(name, points["step"].tolist(), points[name].tolist()))
    return charts


def ablation_tables(folder: Path) -> list[dict[str, Any]]:
    paper = {"masking": published.MASKING, "beta": published.BETA}
    files = [(name, folder / f"{name}.json") for name in paper]
    return [
        {"name": name, "rows": cells_of(json.loads(file.read_text())), "published": paper[name]}
        for name, file in files
        if file.exists()
    ]
