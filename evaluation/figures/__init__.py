"""The paper's figures and a chart of every table, as PNG and SVG."""

from evaluation.figures.write import write_figures

__all__ = ["write_figures"]
