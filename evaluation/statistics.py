"""Means with bootstrap intervals over subjects, paired differences, and what a mean is made of."""

import re
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd


class Metric(NamedTuple):
    """A mean of the tables: of a column of scores.parquet, over these kinds of prompt."""

    column: str
    kinds: tuple[str, ...]
    title: str


#: In the order of the paper's Table 1.
TABLE_1 = {
    "dino": Metric("dino", ("context", "real"), "DINO"),
    "clip_t_context": Metric("clip_t", ("context",), "CLIP-T(c)"),
    "clip_i": Metric("clip_i", ("context", "real"), "CLIP-I"),
    "clip_t_texture": Metric("clip_t", ("texture",), "CLIP-T(t)"),
}
#: What a protocol may ask for besides: shown where it was made.
EXTRAS = {
    "dino_masked": Metric("dino_masked", ("context", "real"), "DINO, subject"),
    "clip_i_masked": Metric("clip_i_masked", ("context", "real"), "CLIP-I, subject"),
    "clip_t_background": Metric("clip_t_background", ("context",), "CLIP-T, background"),
    "copy_paste": Metric("copy_paste", ("context",), "copy-paste"),
    "diversity": Metric("diversity", ("context",), "diversity"),
    "dinov2": Metric("dinov2", ("context", "real"), "DINOv2"),
    "dinov3": Metric("dinov3", ("context", "real"), "DINOv3"),
    "siglip2_i": Metric("siglip2_i", ("context", "real"), "SigLIP2-I"),
    "dreamsim": Metric("dreamsim", ("context", "real"), "DreamSim"),
    "siglip2_t_context": Metric("siglip2_t", ("context",), "SigLIP2-T(c)"),
    "siglip2_t_texture": Metric("siglip2_t", ("texture",), "SigLIP2-T(t)"),
    "dino_accessory": Metric("dino", ("accessory",), "DINO, accessory"),
    "clip_t_accessory": Metric("clip_t", ("accessory",), "CLIP-T, accessory"),
    "dino_pose": Metric("dino", ("pose",), "DINO, pose"),
    "clip_t_pose": Metric("clip_t", ("pose",), "CLIP-T, pose"),
    "dino_camera": Metric("dino", ("camera",), "DINO, camera"),
    "clip_t_camera": Metric("clip_t", ("camera",), "CLIP-T, camera"),
}
METRICS = TABLE_1 | EXTRAS
RESAMPLES = 2000
LEVEL = 0.95
#: Percentile intervals of few subjects' means are too narrow: where nothing differs, those of 2 leave out zero half of the time, of 8 in .11, of 30 in .06.
ENOUGH_SUBJECTS = 8

Interval = dict[str, float]


def rows_of(scores: pd.DataFrame, method: str, metric: str) -> pd.DataFrame:
    """A method's rows that have the metric, with its column as `value`; none where it was not made.

    Raises ValueError for scores of more than one protocol, whichever method they are of: what is put beside them would not be comparable.
    """
    refuse_mixed(scores)
    column, kinds, _ = METRICS[metric]
    if column not in scores:
        return scores[:0].assign(value=0.0)
    rows = scores[(scores["method"] == method) & scores["prompt_kind"].isin(kinds) & scores[column].notna()]
    return rows.assign(value=rows[column])


def by_subject(scores: pd.DataFrame, method: str, metric: str) -> pd.DataFrame:
    """Sum and count of a method's values, a row a subject; empty where the metric is not given.

    Where the protocol's aggregation is "subjects", each subject counts once, with its mean.
    """
    return _sums_of(rows_of(scores, method, metric))


def _sums_of(rows: pd.DataFrame) -> pd.DataFrame:
    table = rows.groupby("subject")["value"].agg(["sum", "count"])
    if "aggregation" in rows and (rows["aggregation"] == "subjects").any():
        return table.assign(sum=table["sum"] / table["count"], count=1)
    return table


def subject_means(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean over each subject's pictures, in the data's order; a column a method that has the metric."""
    found = {method: by_subject(scores, method, metric) for method in dict.fromkeys(scores["method"])}
    frame = pd.DataFrame({method: table["sum"] / table["count"] for method, table in found.items() if not table.empty})
    return frame.reindex([subject for subject in dict.fromkeys(scores["subject"]) if subject in frame.index])


def prompt_intervals(scores: pd.DataFrame, metric: str) -> dict[str, dict[str, Interval]]:
    """`{prompt: {method: {mean, lo, hi}}}`; intervals over the subjects that have the prompt.

    Prompts of different subjects are the same where only the subject's name differs, which is written {}. Real pictures have no prompt.
    """
    found: dict[str, dict[str, Interval]] = {}
    for method in dict.fromkeys(scores["method"]):
        for form, rows in _prompted(rows_of(scores, method, metric)).groupby("prompt", sort=False):
            if cell := method_interval(_sums_of(rows)):
                found.setdefault(str(form), {})[method] = cell
    return found


def _prompted(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of generated pictures, their prompts without the subject's name."""
    rows = rows[rows["prompt"] != ""]
    return rows.assign(prompt=[prompt_form(*given) for given in zip(rows["prompt"], rows["label"], strict=True)])


def prompt_form(prompt: str, label: str) -> str:
    """`a cat in the snow` -> `a {} in the snow`, its plural too, so that the same words for different subjects meet in one row."""
    return re.sub(rf"\b{re.escape(label)}s?\b", "{}", prompt) if label else prompt


def leaves_out_zero(cell: Mapping[str, Any]) -> bool:
    """Whether a difference's interval, of enough subjects, lies on one side of zero; a single subject has none (lo = hi)."""
    return cell.get("subjects", ENOUGH_SUBJECTS) >= ENOUGH_SUBJECTS and cell["lo"] < cell["hi"] and (cell["lo"] > 0 or cell["hi"] < 0)


def by_chance(differences: Iterable[Mapping[str, Any]]) -> str:
    """What a difference that stands out means, and how many of these would if nothing differed: intervals are not corrected for their number."""
    count = sum(cell.get("subjects", ENOUGH_SUBJECTS) >= ENOUGH_SUBJECTS for cell in differences)
    some = f"{(1 - LEVEL) * count:.{0 if (1 - LEVEL) * count >= 1 else 1}f}"
    told = f" Of {count} such differences {some} would by chance, if nothing differed." if count else ""
    return f"the interval leaves out zero, with {ENOUGH_SUBJECTS} subjects or more.{told}"


def protocols_of(scores: pd.DataFrame) -> dict[str, str]:
    """Digest -> name; empty for frames that do not say."""
    if "protocol_digest" not in scores:
        return {}
    each = scores.drop_duplicates("protocol_digest")
    return dict(zip(each["protocol_digest"], each["protocol" if "protocol" in each else "protocol_digest"], strict=True))


def refuse_mixed(scores: pd.DataFrame) -> None:
    found = protocols_of(scores)
    if len(found) > 1:
        titles = ", ".join(f"{name!r} ({digest})" for digest, name in sorted(found.items(), key=lambda item: item[1]))
        raise ValueError(f"scores of different protocols are not comparable: {titles}")


def draws(subjects: int) -> np.ndarray:
    """Subjects of each resample, drawn with replacement, the same each time: int [RESAMPLES, subjects]."""
    return np.random.default_rng(0).integers(0, subjects, (RESAMPLES, subjects))


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


def method_interval(table: pd.DataFrame) -> Interval | None:
    """Of a table from `by_subject`; None where it is empty."""
    if table.empty:
        return None
    return interval(mean_of(table), resampled_means(table, draws(len(table))))


def difference(first: pd.DataFrame, second: pd.DataFrame) -> Interval | None:
    """first - second, tables from `by_subject`, over the `subjects` that both have, both resampled with the same subjects."""
    first, second = in_common(first, second)
    if first.empty:
        return None
    drawn = draws(len(first))
    return interval(mean_of(first) - mean_of(second), resampled_means(first, drawn) - resampled_means(second, drawn)) | {"subjects": len(first)}


def in_common(first: pd.DataFrame, second: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    common = first.index.intersection(second.index)
    return first.loc[common], second.loc[common]


def summarise(scores: pd.DataFrame) -> dict[str, Any]:
    """`{method: {metric: {mean, lo, hi}}, "differences": [{a, b, metric, mean, lo, hi, subjects}]}`; pairs of generated methods.

    Raises ValueError for scores of several protocols.
    """
    refuse_mixed(scores)
    tables = {method: {metric: by_subject(scores, method, metric) for metric in METRICS} for method in dict.fromkeys(scores["method"])}
    summary: dict[str, Any] = {}
    for method, made in tables.items():
        summary[method] = {metric: found for metric, table in made.items() if (found := method_interval(table))}
    real = oracles(scores)
    generated = [method for method in tables if method not in real]
    summary["differences"] = [
        {"a": a, "b": b, "metric": metric, **found}
        for a, b in combinations(generated[::-1], 2)  # later rows of a table minus earlier ones
        for metric in METRICS
        if (found := difference(tables[a][metric], tables[b][metric]))
    ]
    return summary


def oracles(scores: pd.DataFrame) -> list[str]:
    """Methods whose pictures are the real ones."""
    return list(dict.fromkeys(scores[scores["prompt_kind"] == "real"]["method"]))


def above_oracle(scores: pd.DataFrame, summary: dict[str, Any]) -> list[str]:
    """A sentence for each method that is closer to the subject than its real pictures are to each other: it copies its input.

    Over the subjects that both have: those with a single picture have no score of the real ones.
    """
    warnings = []
    for oracle in oracles(scores):
        for method in [name for name in summary if name not in ("differences", *oracles(scores))]:
            for metric in [metric for metric in summary[oracle] if metric in summary[method]]:
                made, real = in_common(by_subject(scores, method, metric), by_subject(scores, oracle, metric))
                if len(made) and mean_of(made) > mean_of(real):
                    warnings.append(f"{method} passes {oracle} in {metric} ({mean_of(made):.3f} > {mean_of(real):.3f}): it may be copying its input")
    return warnings
