"""report/index.html: tables with intervals, figures, breakdowns, training curves and ablations in one file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

from evaluation import published
from evaluation.config import EvalConfig
from evaluation.figures.ablations import Ablation, read_ablations
from evaluation.figures.charts import curve, figure_7, interval_figure, subject_lines, sweep_figure
from evaluation.figures.grids import Grid, draw_grid
from evaluation.figures.scored import comparison, shown
from evaluation.figures.style import colors_of, encoded, svg_address
from evaluation.figures.tables import Cells, difference_rows, metrics_in, named_rows, read_about, read_scores, read_summary
from evaluation.figures.write import COMMUNITY, MADE, draws_moma, read_grid, scored_grids
from evaluation.made_with import changed_since, options_of
from evaluation.names import method_name, metric_name
from evaluation.report import tables
from evaluation.report.pictures import as_data, narrow
from evaluation.stamps import read_stamp
from evaluation.statistics import LEVEL, METRICS, by_chance, oracles, prompt_intervals, subject_means
from moma_lightning.files import write_bytes

CURVES = ("train/loss", "train/data_wait", "val/")


@dataclass
class Chart:
    """An image's `data:` address and what it is called where it cannot be seen."""

    address: str
    title: str


def write_report(config: EvalConfig) -> Path:
    """Write report/index.html and report/grid.png from what `score`, `ablate` and `figures` left. Raises FileNotFoundError before `score`."""
    scores = read_scores(config)
    if compared := comparison(scores, config.report.subjects, config.report.prompts):
        write_bytes(config.report_folder / "grid.png", encoded(draw_grid(compared, inches=0.8), "png"))
    path = config.report_folder / "index.html"
    write_bytes(path, render(context(config, scores, compared)).encode())
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


def context(config: EvalConfig, scores: pd.DataFrame, compared: Grid | None) -> dict[str, Any]:
    about = read_about(config)
    return {
        "title": config.report.title,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "about": about,
        "warnings": all_warnings(config, about, scores),
        "subjects": scores["subject"].nunique(),
        "pictures": len(scores),
        "level": f"{LEVEL:.0%}",
        **scores_section(config, scores),
        "grids": grids(config, scores, compared),
        "narrow": narrow,
        "data": lambda path: as_data(path, config.report.pixels),
        "breakdowns": breakdowns(scores),
        "lines": subject_charts(scores),
        "ablations": [ablation_section(ablation) for ablation in read_ablations(config)],
        "curves": training_curves(Path(config.run)),
        "published": tables.published_table("Method", published.TABLE_1),
        "published_note": published.NOTE,
    }


def all_warnings(config: EvalConfig, about: dict[str, Any], scores: pd.DataFrame) -> list[str]:
    """What the scoring warned of, and what has changed since."""
    return [in_words(sentence, list(dict.fromkeys(scores["method"]))) for sentence in about["warnings"]] + stale(config, about, scores)


def stale(config: EvalConfig, about: dict[str, Any], scores: pd.DataFrame) -> list[str]:
    """A sentence where the scores are of another protocol, of other weights or options than figures and ablations on this page, or of other pictures."""
    before, now = about.get("made_with"), options_of(config.methods)
    if before is None or "picture_sha256" not in scores:
        return ["The scores do not say what they were made with: score again"]
    methods = about.get("methods", now)
    changed = changed_since(before, config) + [name for name in now | methods if methods.get(name) != now.get(name)]
    found = [f"The scores were made with another {', '.join(changed)} than there is now: score again"] if changed else []
    pictures = shown(scores)
    others = sum((read_stamp(Path(row.path)) or {}).get("sha256") != row.picture_sha256 for row in pictures.itertuples())
    return found + ([f"{others} of the {len(pictures)} pictures that figures choose from are not those that were scored: score again"] if others else [])


def in_words(sentence: str, methods: Sequence[str]) -> str:
    """A warning of the statistics with the names that people use in the place of keys."""
    names = {**{key: method_name(key) for key in methods}, **{key: metric_name(key) for key in METRICS}}
    keys = sorted(map(re.escape, names), key=len, reverse=True)
    return re.sub(rf"(?<![\w.])({'|'.join(keys)})(?![\w])", lambda match: names[match.group()], sentence)


def scores_section(config: EvalConfig, scores: pd.DataFrame) -> dict[str, Any]:
    """The headline tables with their charts, then the differences with theirs."""
    summary = read_summary(config)
    rows, differences = named_rows(summary), difference_rows(summary)
    metrics = metrics_in(*rows.values())
    colors = {method_name(key): color for key, color in colors_of(scores).items()}
    contenders = [name for name in rows if name not in map(method_name, oracles(scores))]
    return {
        "headline": tables.score_tables("Method", rows, metrics, contenders),
        "score_charts": interval_charts(rows, colors, metrics),
        "differences": tables.difference_tables(differences, metrics) if differences else [],
        "by_chance": by_chance(cell for cells in differences.values() for cell in cells.values()),
        "difference_charts": interval_charts(differences, {}, metrics, width=4.8, zero=True),
    }


def interval_charts(rows: Mapping[str, Cells], colors: Mapping[str, str], metrics: Sequence[str], width: float = 2.6, zero: bool = False) -> list[Chart]:
    """A chart a metric, so that a narrow page can put them below each other."""
    return [as_chart(interval_figure(rows, colors, [metric], zero, width), metric_name(metric)) for metric in metrics]


def as_chart(figure: Figure, title: str) -> Chart:
    return Chart(svg_address(figure), title)


def grids(config: EvalConfig, scores: pd.DataFrame, compared: Grid | None) -> list[Grid]:
    """Figures 4 to 6 from the scores, 8 to 10 as `figures` left them where the config still draws them, by their numbers."""
    found = [compared if grid.name == "figure6" else grid for grid in scored_grids(config, scores)]
    found += [read_grid(config, name) for name in MADE if draws_moma(config) and (config.report.bases or name != COMMUNITY)]
    return sorted([grid for grid in found if grid is not None], key=lambda grid: grid.number)


def breakdowns(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """Means by subject and by prompt, a table a metric."""
    frames = {metric_name(metric): subject_means(scores, metric) for metric in METRICS}
    prompts = {metric_name(metric): prompt_intervals(scores, metric) for metric in METRICS}
    return [
        {"name": "subject", "about": "The mean over each subject's pictures.",
         "tables": {name: tables.means_table("Subject", frame) for name, frame in frames.items() if not frame.empty}},
        {"name": "prompt", "about": f"The mean over all subjects and its {LEVEL:.0%} interval over them; … stands for the subject.",
         "tables": {name: tables.prompt_table(rows) for name, rows in prompts.items() if rows}},
    ]


def subject_charts(scores: pd.DataFrame) -> list[Chart]:
    """Figure 7."""
    colors = colors_of(scores)
    found = [(metric, subject_lines(scores, metric, colors)) for metric in figure_7()]
    return [as_chart(figure, f"{metric_name(metric)} by subject") for metric, figure in found if figure]


def ablation_section(ablation: Ablation) -> dict[str, Any]:
    paper = published.ABLATIONS.get(ablation.published or "")
    if ablation.values and len(ablation.values) > 1:
        rows = list(ablation.rows.values())
        charts = [as_chart(sweep_figure(ablation.values, rows, ablation.axis, [m]), f"{metric_name(m)} over {ablation.axis}") for m in ablation.metrics]
    else:
        charts = interval_charts(ablation.rows, {}, ablation.metrics)
    return {
        "title": ablation.title,
        "tables": tables.score_tables("Setting", ablation.rows, ablation.metrics),
        "charts": charts,
        "differences": tables.difference_tables(ablation.differences, ablation.metrics) if ablation.differences else [],
        "by_chance": by_chance(cell for cells in ablation.differences.values() for cell in cells.values()),
        "published": tables.published_table(ablation.axis.capitalize(), paper) if paper else None,
    }


def training_curves(run: Path) -> dict[str, list[Chart]]:
    """Curves of each stage's newest metrics.csv (Lightning's CSVLogger), losses and validation values."""
    found = {}
    for stage in sorted(p for p in run.glob("stage*") if p.is_dir()):
        files = sorted(stage.rglob("metrics.csv"), key=lambda p: p.stat().st_mtime)
        charts = stage_charts(pd.read_csv(files[-1])) if files else []
        if charts:
            found[stage.name.replace("stage", "Stage ")] = charts
    return found


def stage_charts(table: pd.DataFrame) -> list[Chart]:
    if "step" not in table:
        return []
    charts = []
    for name in (column for column in table.columns if column.startswith(CURVES)):
        points = table[["step", name]].apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan).dropna()
        points = points.drop_duplicates("step", keep="last").sort_values("step")  # a resumed training writes some steps again
        if len(points) > 1:
            charts.append(as_chart(curve(name, points["step"].tolist(), points[name].tolist()), name))
    return charts
