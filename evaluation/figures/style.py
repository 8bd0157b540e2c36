"""One look for all figures, and their way to disk and into the page. No pyplot: a figure belongs to who drew it, in any thread."""

import base64
import io
from itertools import cycle
from pathlib import Path
from typing import Literal

import pandas as pd
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from evaluation.statistics import oracles
from moma_lightning.files import write_bytes

INK, SOFT, LINE = "#1c1f24", "#667085", "#e4e7ec"
#: Of lines, one for each round of colours.
MARKERS = "os^Dv"
#: Told apart by people who do not tell red from green (Okabe and Ito's palette, darkened for thin lines on white).
COLORS = ("#0b62a8", "#d35400", "#00855f", "#b0578d", "#8a6d00", "#3f9bd1", "#7a3e9d", "#5b6470")
REAL = "#98a2b3"
DPI = 160
FONTS = ("Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "Noto Sans", "DejaVu Sans")
#: What a browser shows in the place of the font that laid the figure out.
WEB_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


def font() -> str:
    """The first of FONTS that is installed; matplotlib brings the last."""
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return next(name for name in FONTS if name in installed)


def settings() -> dict:
    return {
        "font.family": font(),
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.labelcolor": SOFT,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": LINE,
        "grid.linewidth": 0.7,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "svg.fonttype": "none",
        "svg.hashsalt": "figure",
        "savefig.dpi": DPI,
    }


def styled():
    """Context in which figures are drawn and saved."""
    return rc_context(settings())


def colors_of(scores: pd.DataFrame) -> dict[str, str]:
    """One colour a method in every figure, from the first again after the eighth; grey for the real pictures."""
    real, colors = oracles(scores), cycle(COLORS)
    return {name: REAL if name in real else next(colors) for name in dict.fromkeys(scores["method"])}


def encoded(figure: Figure, form: Literal["png", "svg"]) -> bytes:
    """The figure as PNG or SVG, the same bytes each time: no date, no random ids."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format=form, metadata={"Date": None} if form == "svg" else {"Software": None})
    if form == "svg":
        return buffer.getvalue()
    smaller = io.BytesIO()
    Image.open(buffer).convert("RGB").save(smaller, format="PNG", dpi=(DPI, DPI))
    return smaller.getvalue()


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """`<folder>/<name>.png` and `.svg`."""
    forms: tuple[Literal["png"], Literal["svg"]] = ("png", "svg")
    for form in forms:
        write_bytes(folder / f"{name}.{form}", encoded(figure, form))
    return [folder / f"{name}.{form}" for form in forms]


def svg_address(figure: Figure) -> str:
    """A `data:` address of the figure for an <img>: its ids cannot meet another figure's there."""
    svg = encoded(figure, "svg").decode().replace(f"'{font()}'", WEB_FONTS)
    return "data:image/svg+xml;base64," + base64.b64encode(svg[svg.index("<svg") :].encode()).decode()


def bare(axes: Axes) -> None:
    """Axes for a picture: no frame, ticks or grid."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
