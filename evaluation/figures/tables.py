"""What the charts and the page read of a run: scores and summaries, with the names people use."""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from evaluation.config import EvalConfig
from evaluation.names import method_name, methods_of
from evaluation.statistics import METRICS

Cells = dict[str, dict[str, float]]


def read_scores(config: EvalConfig) -> pd.DataFrame:
    """Raises FileNotFoundError before `score`."""
    path = config.eval_folder / "scores.parquet"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m evaluation dreambooth` with the same config first")
    return pd.read_parquet(path)


def read_about(config: EvalConfig) -> dict[str, Any]:
    """What the last scoring was made with and warned of: its protocol, methods, weights, revision (`dreambooth.write_tables`)."""
    return json.loads((config.eval_folder / "protocol.json").read_text())


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
        pair = f"{known.get(row['a'], method_name(row['a']))} \u2212 {known.get(row['b'], method_name(row['b']))}"
        rows.setdefault(pair, {})[row["metric"]] = {key: row[key] for key in ("mean", "lo", "hi", "subjects") if key in row}
    return rows
