"""`<run>/figures`: every figure as PNG and SVG, and the picture grids as JSON, from which the report page shows them."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from evaluation.config import EvalConfig
from evaluation.figures import sampled, scored
from evaluation.figures.ablations import read_ablations
from evaluation.figures.charts import figure_7, interval_figure, subject_lines, sweep_figure
from evaluation.figures.grids import Grid, draw_grid, from_json, to_json
from evaluation.figures.style import colors_of, write_figure
from evaluation.figures.tables import difference_rows, metrics_in, named_rows, read_scores, read_summary
from evaluation.methods import Moma
from evaluation.names import method_name
from evaluation.plan import Evaluation
from evaluation.studio import Studio
from moma_lightning.files import write_bytes

#: Grids whose pictures are sampled for them.
COMMUNITY = "figure10_community"  # on the config's `report.bases`
MADE = ("figure8", "figure9", "figure10_settings", COMMUNITY)

logger = logging.getLogger(__name__)


def figures_folder(config: EvalConfig) -> Path:
    return Path(config.run) / "figures"


def write_figures(config: EvalConfig) -> list[Path]:
    """Write the paper's figures and a chart of every table as PNG and SVG; returns their paths.

    Figures 8 to 10 sample pictures, once: they need the config's adapter and decoder, and MoMA among its methods, and are left out without. Raises
    FileNotFoundError before `score`.
    """
    folder, scores = figures_folder(config), read_scores(config)
    paths = []
    for name, figure in charts(config, scores):
        paths += write_figure(figure, folder, name)
    for grid in (*scored_grids(config, scores), *made_grids(config)):
        write_bytes(folder / f"{grid.name}.json", to_json(grid))
        paths += write_figure(draw_grid(grid), folder, grid.name)
    logger.info("%s: %d files", folder, len(paths))
    return paths


def scored_grids(config: EvalConfig, scores: pd.DataFrame) -> list[Grid]:
    """Figures 4, 5 and 6."""
    own = scored.own_method(config, scores)
    if own is None:
        return []
    by = f"{method_name(own)}. One picture of the subject in, new pictures out."
    grids = [
        scored.one_method(scores, own, "context", "figure4", "New contexts", by),
        scored.one_method(scores, own, "texture", "figure5", "New textures", by),
        scored.comparison(scores, subjects=5, prompts=2),
    ]
    return [grid for grid in grids if grid is not None]


def draws_moma(config: EvalConfig) -> bool:
    """Whether the config has what Figures 8 to 10 are drawn with."""
    return config.adapter is not None and config.decoder is not None and any(isinstance(method, Moma) for method in config.methods.values())


def made_grids(config: EvalConfig) -> Iterator[Grid]:
    """Figures 8, 9 and 10, their missing pictures made."""
    if not draws_moma(config):
        logger.info("no adapter, no decoder or no MoMA among the methods of the config: Figures 8 to 10 are left out")
        return
    studio = Studio(Evaluation.open(config, config.resolved_device()), figures_folder(config) / "pictures")
    yield sampled.beta_strip(studio)
    yield sampled.masking_grid(studio)
    yield sampled.settings_grid(studio, config.report.settings_base)
    if config.report.bases:
        yield sampled.community_grid(studio, config.report.bases)


def read_grid(config: EvalConfig, name: str) -> Grid | None:
    """A grid that `write_figures` left, while all its pictures are there."""
    path = figures_folder(config) / f"{name}.json"
    if not path.exists():
        return None
    grid = from_json(path.read_text())
    return grid if all(Path(cell.path).exists() for row in grid.rows for cell in row.cells) else None


def charts(config: EvalConfig, scores: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Name and figure: the intervals of each table, Figure 7, a curve of each ablation over a number."""
    summary = read_summary(config)
    colors = colors_of(scores)
    rows, differences = named_rows(summary), difference_rows(summary)
    yield "scores", interval_figure(rows, {method_name(key): color for key, color in colors.items()}, metrics_in(*rows.values()))
    if differences:
        yield "differences", interval_figure(differences, {}, metrics_in(*differences.values()), zero=True)
    for metric in figure_7():
        if lines := subject_lines(scores, metric, colors):
            yield f"figure7_{metric}", lines
    for ablation in read_ablations(config):
        yield f"ablation_{ablation.key}", interval_figure(ablation.rows, {}, ablation.metrics)
        if ablation.values and len(ablation.values) > 1:
            yield f"sweep_{ablation.key}", sweep_figure(ablation.values, list(ablation.rows.values()), ablation.axis, ablation.metrics)
