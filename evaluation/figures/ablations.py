"""Ablations as the charts and the page show them: what varies, and the number that each row stands for."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.config import EvalConfig
from evaluation.figures.tables import Cells, difference_rows, metrics_in
from evaluation.made_with import changed_since, options_of
from evaluation.names import NUMBER, axis_name, method_name, methods_of

logger = logging.getLogger(__name__)


@dataclass
class Ablation:
    """One file of `<run>/ablations`. values: the number of each row, None where rows are no numbers. published: the paper's table that it stands for."""

    key: str
    title: str
    axis: str
    rows: dict[str, Cells]
    values: list[float] | None
    differences: dict[str, Cells]
    published: str | None

    @property
    def metrics(self) -> list[str]:
        return metrics_in(*self.rows.values())


def read_ablations(config: EvalConfig) -> list[Ablation]:
    """Every `<run>/ablations/*.json` that holds a table of this protocol and these weights (`made_with`), and of the main evaluation's options where
    a method is in both; the paper's own two come first."""
    paths = sorted(config.ablations_folder.glob("*.json"), key=lambda path: ({"masking": 0, "beta": 1}.get(path.stem, 2), path.stem))
    summaries = {path.stem: read_json(path) for path in paths}
    tables = {key: summary for key, summary in summaries.items() if methods_of(summary)}
    now = options_of(config.methods)
    stale = [key for key, summary in tables.items() if "methods" not in summary or changed_since(summary.get("made_with", {}), config) or
             any(now.get(name, options) != options for name, options in summary["methods"].items())]
    for key in stale:
        why = "it was made under another protocol or with other weights or options" if "methods" in tables[key] else "it does not say its options"
        logger.warning("%s is left out: %s; run `evaluation ablate` again", config.ablations_folder / key, why)
    return [read_ablation(key, summary) for key, summary in tables.items() if key not in stale]


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): remove it, or run `evaluation ablate` again") from error


def read_ablation(key: str, summary: dict[str, Any]) -> Ablation:
    rows = methods_of(summary)
    axis, values = varying(list(rows), [settings_of(summary, name) for name in rows], key)
    if values and len(set(values)) < len(values):  # two rows at one number, as where one leaves to the sampler what the other says
        axis, values = key, None
    labels = [f"{axis_name(axis)} {value:g}" for value in values] if values else list(map(method_name, rows))
    names = dict(zip(rows, labels, strict=True))
    title = summary.get("title") or axis_name(key).capitalize()
    named = {names[name]: cells for name, cells in rows.items()}
    return Ablation(key, title, axis_name(axis), named, values, difference_rows(summary, names), summary.get("published", key))


def settings_of(summary: dict[str, Any], name: str) -> dict[str, Any]:
    """What a method's pictures were drawn with: its options, the sampler's where it leaves them open."""
    options = summary.get("methods", {}).get(name, {})
    return summary.get("sampler", {}) | {key: value for key, value in options.items() if value is not None}


def varying(names: Sequence[str], options: Sequence[dict[str, Any]], axis: str) -> tuple[str, list[float] | None]:
    """The one number in which the rows differ, by their options; else `axis` and the numbers at the ends of their names, if all have it."""
    known = set().union(*options)
    keys = [key for key in known if any(one.get(key) != options[0].get(key) for one in options)]
    if len(keys) == 1 and all(is_number(one.get(keys[0])) for one in options):
        return keys[0], [float(one[keys[0]]) for one in options]
    found = [NUMBER.search(name) for name in names]
    if names and all(match and name[: match.start()].endswith(axis) for match, name in zip(found, names, strict=True)):
        return axis, [float(match.group(1)) for match in found if match]
    return axis, None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
