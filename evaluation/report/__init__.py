"""One self-contained HTML page, and the picture grid of the README."""

from evaluation.report.page import write_report

__all__ = ["write_report"]
