"""What the charts and the page read of a run: scores, summaries and ablations, with the names people use."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation.config import EvalConfig
from evaluation.figures.names import axis_name, method_name, methods_of, setting_values
from evaluation.statistics import METRICS

Cells = dict[str, dict[str, float]]


def read_scores(config: EvalConfig) -> pd.DataFrame:
    """Raises FileNotFoundError before `score`."""
    path = config.eval_folder / "scores.parquet"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m evaluation dreambooth` with the same config first")
    return pd.read_parquet(path)


def read_summary(config: EvalConfig) -> dict[str, Any]:
    return json.loads((config.eval_folder / "summary.json").read_text())


def metrics_in(*rows: Mapping[str, Any]) -> list[str]:
    """The metrics that any of the rows has, in the tables' order."""
    return [metric for metric in METRICS if any(row.get(metric) for row in rows)]


def named_rows(summary: Mapping[str, Any]) -> dict[str, Cells]:
    return {method_name(key): cells for key, cells in methods_of(summary).items()}


def difference_rows(summary: Mapping[str, Any], names: Mapping[str, str] | None = None) -> dict[str, Cells]:
    """`a - b` -> {metric: interval}; names: what to call the methods, if not by `method_name`."""
    known = names or {}
    rows: dict[str, Cells] = {}
    for row in summary.get("differences", []):
        pair = f"{known.get(row['a'], method_name(row['a']))} - {known.get(row['b'], method_name(row['b']))}"
        rows.setdefault(pair, {})[row["metric"]] = {key: row[key] for key in ("mean", "lo", "hi")}
    return rows


@dataclass
class Ablation:
    """One file of `<run>/ablations`. values: the number of each row, None where rows are no numbers."""

    key: str
    title: str
    rows: dict[str, Cells]
    values: list[float] | None
    differences: dict[str, Cells]

    @property
    def axis(self) -> str:
        return axis_name(self.key)

    @property
    def metrics(self) -> list[str]:
        return metrics_in(*self.rows.values())


def read_ablations(config: EvalConfig) -> list[Ablation]:
    """Every `<run>/ablations/*.json` that holds a table; the paper's own two come first."""
    paths = sorted(config.ablations_folder.glob("*.json"), key=lambda path: ({"masking": 0, "beta": 1}.get(path.stem, 2), path.stem))
    found = [read_ablation(path, getattr(config.ablations, path.stem, None)) for path in paths]
    return [ablation for ablation in found if ablation.rows]


def read_ablation(path: Path, configured: Any = None) -> Ablation:
    summary = json.loads(path.read_text())
    values = setting_values(summary, path.stem, configured)
    keys = list(methods_of(summary))
    labels = [f"{axis_name(path.stem)} {value:g}" for value in values] if values else list(map(method_name, keys))
    names = dict(zip(keys, labels, strict=True))
    title = summary.get("title") or axis_name(path.stem).capitalize()
    rows = {names[key]: cells for key, cells in methods_of(summary).items()}
    return Ablation(path.stem, title, rows, values, difference_rows(summary, names))
