"""Pictures beside each other, for logs."""

from collections.abc import Sequence

from PIL import Image


def picture_grid(rows: Sequence[Sequence[Image.Image]], gap: int = 2) -> Image.Image:
    """Rows of pictures on white, each at the size of the first, `gap` pixels apart."""
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture.resize((width, height)), (x * (width + gap), y * (height + gap)))
    return sheet
