"""Means with bootstrap intervals over subjects, and paired differences."""

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

#: Metric -> column and kind of prompt, in the order of the paper's Table 1.
METRICS = {
    "dino": ("dino", ("context", "real")),
    "clip_t_context": ("clip_t", ("context",)),
    "clip_i": ("clip_i", ("context", "real")),
    "clip_t_texture": ("clip_t", ("texture",)),
}
RESAMPLES = 2000
LEVEL = 0.95

Interval = dict[str, float]


def by_subject(scores: pd.DataFrame, method: str, metric: str) -> pd.DataFrame:
    """Sum and count of a method's values, a row a subject; empty where the metric is not given."""
    column, kinds = METRICS[metric]
    rows = scores[(scores["method"] == method) & scores["prompt_kind"].isin(kinds) & scores[column].notna()]
    return rows.groupby("subject")[column].agg(["sum", "count"])


def draws(subjects: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Subjects of each resample, drawn with replacement: int [resamples, subjects]."""
    return np.random.default_rng(seed).integers(0, subjects, (resamples, subjects))


def resampled_means(table: pd.DataFrame, drawn: np.ndarray) -> np.ndarray:
    """The mean over pictures in each resample of subjects; all of a subject's pictures come and go together."""
    sums, counts = table["sum"].to_numpy(), table["count"].to_numpy()
    return sums[drawn].sum(1) / counts[drawn].sum(1)


def interval(mean: float, resampled: np.ndarray) -> Interval:
    """Percentile interval at LEVEL."""
    lo, hi = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"mean": float(mean), "lo": float(lo), "hi": float(hi)}


def mean_of(table: pd.DataFrame) -> float:
    return table["sum"].sum() / table["count"].sum()


def method_interval(scores: pd.DataFrame, method: str, metric: str, resamples: int = RESAMPLES) -> Interval | None:
    table = by_subject(scores, method, metric)
    if table.empty:
        return None
    return interval(mean_of(table), resampled_means(table, draws(len(table), resamples)))


def difference(scores: pd.DataFrame, a: str, b: str, metric: str, resamples: int = RESAMPLES) -> Interval | None:
    """a - b over the subjects that both have, both resampled with the same subjects."""
    tables = [by_subject(scores, method, metric) for method in (a, b)]
    common = tables[0].index.intersection(tables[1].index)
    if not len(common):
        return None
    first, second = (table.loc[common] for table in tables)
    drawn = draws(len(common), resamples)
    return interval(mean_of(first) - mean_of(second), resampled_means(first, drawn) - resampled_means(second, drawn))


def summarise(scores: pd.DataFrame, resamples: int = RESAMPLES) -> dict[str, Any]:
    """`{method: {metric: {mean, lo, hi}}, "differences": [{a, b, metric, mean, lo, hi}]}`; pairs of generated methods."""
    methods = list(dict.fromkeys(scores["method"]))
    summary: dict[str, Any] = {}
    for method in methods:
        found = {metric: method_interval(scores, method, metric, resamples) for metric in METRICS}
        summary[method] = {metric: value for metric, value in found.items() if value is not None}
    generated = [m for m in methods if m not in oracles(scores)]
    summary["differences"] = list(differences(scores, generated, resamples))
    return summary


def differences(scores: pd.DataFrame, methods: Iterable[str], resamples: int) -> Iterable[dict[str, Any]]:
    for a, b in combinations(list(methods)[::-1], 2):  # later rows of a table minus earlier ones
        for metric in METRICS:
            found = difference(scores, a, b, metric, resamples)
            if found is not None:
                yield {"a": a, "b": b, "metric": metric, **found}


def oracles(scores: pd.DataFrame) -> list[str]:
    """Methods whose pictures are the real ones."""
    return list(dict.fromkeys(scores[scores["prompt_kind"] == "real"]["method"]))


def above_oracle(scores: pd.DataFrame, summary: dict[str, Any]) -> list[str]:
    """A sentence for each method that is closer to the subject than its real pictures are to each other: it copies its input."""
    warnings = []
    for oracle in oracles(scores):
        for method, metrics in summary.items():
            if method in ("differences", oracle):
                continue
            for metric in ("dino", "clip_i"):
                if metric in metrics and metrics[metric]["mean"] > summary[oracle][metric]["mean"]:
                    warnings.append(
                        f"{method} passes {oracle} in {metric} ({metrics[metric]['mean']:.3f} > "
                        f"{summary[oracle][metric]['mean']:.3f}): it may be copying its input"
                    )
    return warnings
