"""How pictures and grids get into the page."""

import base64
import io
from functools import lru_cache
from pathlib import Path

from PIL import Image

from evaluation.figures.grids import Grid
from evaluation.stamps import load_picture

#: Pictures up to this side stay exact; larger ones would make the page heavy.
LOSSLESS_UP_TO = 128


@lru_cache(maxsize=4096)
def as_data(path: str, pixels: int) -> str:
    """A `data:` address of the picture as WebP, no wider or higher than `pixels`."""
    image = load_picture(Path(path))
    if max(image.size) > pixels:
        image.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=90, lossless=max(image.size) <= LOSSLESS_UP_TO)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def narrow(grid: Grid) -> int:
    """Pictures a line on a phone: what the grid says, else all of a row up to six."""
    return grid.wrap or (grid.width if grid.width <= 6 else 4)
