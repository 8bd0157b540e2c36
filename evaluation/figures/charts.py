"""Charts of numbers: intervals of a table, Figure 7's lines, sweeps over an ablation's axis, training curves."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.figures.style import COLORS, MARKERS, SOFT, styled
from evaluation.names import column_of, method_name, metric_name
from evaluation.statistics import METRICS, subject_means

Interval = Mapping[str, float]
COLUMNS = 4


def panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """`count` charts beside each other, at most COLUMNS a line; sizes of one in inches."""
    columns = min(count, COLUMNS)
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def interval_figure(
    rows: Mapping[str, Mapping[str, Interval]], colors: Mapping[str, str], metrics: Sequence[str], zero: bool = False, width: float = 3.0
) -> Figure:
    """A panel a metric: a dot and its interval for each row {name: {metric: interval}}. zero: a line there, for differences. width: of a panel, inches."""
    with styled():
        figure, axes = panels(len(metrics), width, 0.62 + 0.25 * len(rows))
        for i, (one, metric) in enumerate(zip(axes, metrics, strict=True)):
            draw_intervals(one, [cells.get(metric) for cells in rows.values()], [colors.get(name, COLORS[0]) for name in rows])
            one.set_yticks(range(len(rows)), list(rows) if i % COLUMNS == 0 else [])
            one.set_title(metric_name(metric))
            if zero:
                one.axvline(0, color=SOFT, linewidth=0.9, zorder=1)
    return figure


def draw_intervals(axes: Axes, cells: Sequence[Interval | None], colors: Sequence[str]) -> None:
    for y, (cell, color) in enumerate(zip(cells, colors, strict=True)):
        if cell:
            axes.plot([cell["lo"], cell["hi"]], [y, y], color=color, linewidth=1.8, solid_capstyle="round")
            axes.plot(cell["mean"], y, "o", color=color, markersize=5)
    axes.set_ylim(len(cells) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=4)


def sweep_figure(values: Sequence[float], rows: Sequence[Mapping[str, Interval]], axis: str, metrics: Sequence[str]) -> Figure:
    """A panel a metric: its mean over the axis, its interval as a band (paper, Tables 3 and 4 as curves)."""
    ordered = sorted(zip(values, rows, strict=True), key=lambda pair: pair[0])
    with styled():
        figure, axes = panels(len(metrics), 2.9, 2.2)
        for one, metric in zip(axes, metrics, strict=True):
            points = [(value, cells[metric]) for value, cells in ordered if cells.get(metric)]
            x = [value for value, _ in points]
            one.fill_between(x, [c["lo"] for _, c in points], [c["hi"] for _, c in points], color=COLORS[0], alpha=0.14, linewidth=0)
            one.plot(x, [c["mean"] for _, c in points], "o-", color=COLORS[0], markersize=4.5, linewidth=1.6)
            one.set_title(metric_name(metric))
            one.set_xlabel(axis)
            one.set_xticks(x)
            one.locator_params(axis="y", nbins=5)
    return figure


def figure_7() -> list[str]:
    """The metrics of the paper's Figure 7: CLIP-T with new contexts, CLIP-T with new textures."""
    return [metric for metric in METRICS if column_of(metric) == "clip_t" and METRICS[metric].kinds in (("context",), ("texture",))]


def subject_lines(scores: pd.DataFrame, metric: str, colors: Mapping[str, str]) -> Figure | None:
    """Figure 7, one panel: a vertical line a subject, a line a method. None where nothing was scored."""
    frame = subject_means(scores, metric)
    if frame.empty:
        return None
    with styled():
        figure = Figure(figsize=(max(5.0, 1.6 + 0.27 * len(frame)), 3.1), layout="constrained")
        axes = figure.subplots()
        for method in frame:
            marker = MARKERS[[*colors].index(method) // len(COLORS) % len(MARKERS)]
            axes.plot(range(len(frame)), frame[method], f"{marker}-", color=colors[method], markersize=3.4, linewidth=1.3, label=method_name(method))
        columns = min(len(frame.columns), 6)
        axes.set_title(metric_name(metric), pad=10 + 14 * -(-len(frame.columns) // columns))
        axes.set_xticks(range(len(frame)), [name.replace("_", " ") for name in frame.index], rotation=60, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.5, len(frame) - 0.5)
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.4, columnspacing=1.4)
    return figure


def curve(title: str, x: Sequence[float], y: Sequence[float]) -> Figure:
    """One value over the steps of a training."""
    with styled():
        figure = Figure(figsize=(3.4, 1.9), layout="constrained")
        axes = figure.subplots()
        axes.plot(x, y, color=COLORS[0], linewidth=1.3)
        axes.set_title(title)
        axes.locator_params(nbins=5)
        axes.margins(x=0.01)
    return figure
