"""Tables as the page shows them: every number with what it is sorted by and how it reads on a narrow screen."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from evaluation.figures.tables import Cells
from evaluation.names import method_name, metric_name
from evaluation.statistics import TABLE_1, leaves_out_zero

#: Numbers beside each other that a phone holds without a swipe.
ACROSS = 4
#: Scores of which more is not better by itself: a copy scores high in the one, noise in the other.
UNRANKED = frozenset(("copy_paste", "diversity"))


@dataclass
class Value:
    """A number as text, its interval in full and short, and whether it stands out."""

    number: float
    text: str
    interval: str = ""
    short: str = ""
    stands_out: bool = False


@dataclass
class Table:
    first: str
    titles: list[str]
    rows: list[tuple[str, list[Value | None]]]


def lines_of(metrics: Sequence[str]) -> list[list[str]]:
    """The metrics in groups that fit beside each other; the paper's four are the first."""
    return [list(metrics[start : start + ACROSS]) for start in range(0, len(metrics), ACROSS)]


def decimal(number: float, signed: bool = False) -> str:
    """Three decimals, with a minus sign that is as wide as the plus."""
    return f"{number:{'+' if signed else ''}.3f}".replace("-", "\u2212")


def short(number: float, signed: bool = False) -> str:
    """0.491 -> .491"""
    text = decimal(number, signed)
    return text.replace("0.", ".", 1) if abs(number) < 0.9995 else text


def value_of(cell: Mapping[str, float], signed: bool = False, stands_out: bool = False) -> Value:
    lo, hi = cell["lo"], cell["hi"]
    between = " … " if signed else "\u2013"
    narrow = f"{short(lo, signed)}{between}{short(hi, signed)}"
    return Value(cell["mean"], decimal(cell["mean"], signed), f"[{decimal(lo, signed)}, {decimal(hi, signed)}]", narrow, stands_out)


def score_tables(first: str, rows: Mapping[str, Cells], metrics: Sequence[str], contenders: Iterable[str] | None = None) -> list[Table]:
    """Means and intervals; the best contender of each metric stands out (all rows compete unless some are named)."""
    competing = set(rows if contenders is None else contenders)
    best = {m: max((cells[m]["mean"] for name, cells in rows.items() if name in competing and m in cells), default=None) for m in metrics if m not in UNRANKED}

    def value(name: str, cells: Cells, metric: str) -> Value | None:
        return value_of(cells[metric], stands_out=name in competing and cells[metric]["mean"] == best.get(metric)) if metric in cells else None

    return [
        Table(first, list(map(metric_name, group)), [(name, [value(name, cells, m) for m in group]) for name, cells in rows.items()])
        for group in lines_of(metrics)
    ]


def difference_tables(rows: Mapping[str, Cells], metrics: Sequence[str]) -> list[Table]:
    """Paired differences; those whose interval leaves out zero stand out."""

    def value(cells: Cells, metric: str) -> Value | None:
        return value_of(cells[metric], signed=True, stands_out=leaves_out_zero(cells[metric])) if metric in cells else None

    return [
        Table("Difference", list(map(metric_name, group)), [(name, [value(cells, m) for m in group]) for name, cells in rows.items()])
        for group in lines_of(metrics)
    ]


def published_table(first: str, rows: Mapping[Any, Sequence[float | None]]) -> Table:
    """A table of the paper: means alone, in the columns of its Table 1."""
    return Table(first, list(map(metric_name, TABLE_1)), [(str(name), list(map(plain, row))) for name, row in rows.items()])


def means_table(first: str, frame: pd.DataFrame) -> Table:
    """A row an index entry, a column a method."""
    rows = [(str(name), [plain(v) for v in values]) for name, values in zip(frame.index, frame.to_numpy().tolist(), strict=True)]
    return Table(first, [method_name(method) for method in frame.columns], rows)


def prompt_table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """A row a prompt, a column a method, each with its interval over subjects; the subject's place is shown as an ellipsis."""
    methods = list(dict.fromkeys(method for cells in rows.values() for method in cells))
    lines = [(form.replace("{}", "…"), [value_of(cells[m]) if m in cells else None for m in methods]) for form, cells in rows.items()]
    return Table("Prompt", list(map(method_name, methods)), lines)


def plain(number: float | None) -> Value | None:
    return None if number is None or pd.isna(number) else Value(number, decimal(number))
