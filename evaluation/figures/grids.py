"""Picture grids: what is shown (for the page, where each picture can be clicked) and the same drawn (for PNG and SVG)."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from evaluation.figures.style import DPI, SOFT, bare, styled
from evaluation.stamps import load_picture


@dataclass
class Cell:
    """A picture, what stands below it, and what is told when it is clicked."""

    title: str
    path: str
    caption: str = ""
    prompt: str = ""
    facts: str = ""


@dataclass
class Row:
    """title: stands over the row. cells: the reference first, where there is one."""

    cells: list[Cell]
    title: str = ""


@dataclass
class Grid:
    """A figure of pictures. wrap: pictures a line on a narrow screen, None for all of a row."""

    name: str
    title: str
    about: str
    rows: list[Row]
    columns: list[str] = field(default_factory=list)
    wrap: int | None = None

    @property
    def number(self) -> int:
        """The figure's number in the paper: `figure10_settings` is 10."""
        return int("".join(filter(str.isdigit, self.name)))

    @property
    def width(self) -> int:
        return max(len(row.cells) for row in self.rows)


def to_json(grid: Grid) -> bytes:
    return (json.dumps(asdict(grid), indent=1) + "\n").encode()


def from_json(text: str) -> Grid:
    values: dict[str, Any] = json.loads(text)
    rows = [Row([Cell(**cell) for cell in row["cells"]], row["title"]) for row in values.pop("rows")]
    return Grid(**values, rows=rows)


def spread(items: Sequence, count: int) -> list:
    """`count` of the items, evenly spaced, in order."""
    if count >= len(items):
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


#: Measures of a drawn grid in inches: a line of column heads, row titles, a line of caption, the space between pictures.
HEAD, TITLE, CAPTION, GAP = 0.15, 0.24, 0.14, 0.07


def draw_grid(grid: Grid, inches: float = 1.25) -> Figure:
    """The grid as a figure: column heads, row titles over their rows, captions below pictures. inches: side of a picture."""
    step = inches + GAP
    heights = [step + TITLE * bool(row.title) + CAPTION * caption_lines(row, inches) for row in grid.rows]
    heads = [head_of(name, int(inches * 14)) for name in grid.columns]
    head = GAP + HEAD * max((name.count("\n") + 1 for name in heads), default=0)
    size = (grid.width * step + GAP, head + sum(heights))
    with styled():
        figure = Figure(figsize=size)
        sheet = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(size[1], 0))  # inches, from the top left corner
        bare(sheet)
        for x, name in enumerate(heads):
            sheet.text(GAP + x * step + inches / 2, head - 0.05, name, ha="center", va="bottom", fontsize=8.5)
        top = head
        for row, height in zip(grid.rows, heights, strict=True):
            draw_row(sheet, row, top, inches)
            top += height
    return figure


def draw_row(sheet: Axes, row: Row, top: float, inches: float) -> None:
    if row.title:
        sheet.text(GAP, top + TITLE / 2 - 0.02, row.title, va="center", fontsize=8.5, color=SOFT)
        top += TITLE
    for x, cell in enumerate(row.cells):
        left = GAP + x * (inches + GAP)
        extent = (left, left + inches, top + inches, top)
        sheet.imshow(at_size(cell.path, round(inches * DPI)), extent=extent, interpolation="none", aspect="auto")
        for number, line in enumerate(lines_of(cell.caption, inches)):
            sheet.text(left + inches / 2, top + inches + 0.04 + CAPTION * number, line, ha="center", va="top", fontsize=7, color=SOFT)


@lru_cache(maxsize=512)
def at_size(path: str, pixels: int) -> Image.Image:
    """The picture on a white square of `pixels`, aspect ratio kept."""
    return ImageOps.pad(load_picture(Path(path)), (pixels, pixels), Image.Resampling.BICUBIC, color="white")


def head_of(name: str, width: int) -> str:
    """A column's head, broken at its comma where it is wider than its picture: `MoMA,` over `beta 1`."""
    parts = [name] if len(name) <= width else name.replace(", ", ",\n").splitlines()
    return "\n".join(line for part in parts for line in textwrap.wrap(part, width))


def caption_lines(row: Row, inches: float) -> int:
    return max(len(lines_of(cell.caption, inches)) for cell in row.cells)


def lines_of(caption: str, inches: float) -> list[str]:
    """At most two lines of what fits below a picture at 7 points."""
    return textwrap.wrap(caption, int(inches * 18), max_lines=2, placeholder=" …")
