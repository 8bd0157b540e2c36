"""The picture grid: which pictures are shown, and how they get into the page and into grid.png."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont, ImageOps

from evaluation.stamps import load_picture, read_stamp


@dataclass
class Cell:
    """A picture of the grid with what is told when it is clicked."""

    title: str
    path: Path
    prompt: str = ""
    facts: str = ""
    data: str = ""


@dataclass
class Row:
    subject: str
    prompt: str
    kind: str
    cells: list[Cell]


def spread(items: Sequence, count: int) -> list:
    """`count` of the items, evenly spaced, in order."""
    if count >= len(items):
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def choose_rows(scores: pd.DataFrame, subjects: int, prompts: int) -> list[Row]:
    """Rows of reference | methods: a few subjects, each with a few context prompts and, where there is one, a texture prompt."""
    generated = scores[scores["prompt_kind"] != "real"]
    methods = list(dict.fromkeys(generated["method"]))
    rows = []
    for subject in spread(list(dict.fromkeys(generated["subject"])), subjects):
        own = generated[(generated["subject"] == subject) & (generated["reference_index"] == 0) & (generated["picture"] == 0)]
        context = spread(list(dict.fromkeys(own[own["prompt_kind"] == "context"]["prompt_index"])), prompts - 1)
        texture = spread(list(dict.fromkeys(own[own["prompt_kind"] == "texture"]["prompt_index"])), 1)
        for kind, index in [("context", i) for i in context] + [("texture", i) for i in texture]:
            same = own[(own["prompt_kind"] == kind) & (own["prompt_index"] == index)].set_index("method")
            rows.append(grid_row(same, [m for m in methods if m in same.index], kind))
    return rows


def grid_row(same: pd.DataFrame, methods: list[str], kind: str) -> Row:
    first = same.loc[methods[0]]
    reference = Cell("reference", Path(first["reference"]), prompt=first["subject"], facts="the input picture")
    cells = [Cell(m, Path(same.loc[m, "path"]), first["prompt"], facts_of(same.loc[m])) for m in methods]
    return Row(first["subject"], first["prompt"], kind, [reference, *cells])


def facts_of(score: pd.Series) -> str:
    """Scores and settings in one line each."""
    values = {"DINO": score["dino"], "CLIP-I": score["clip_i"], "CLIP-T": score["clip_t"]}
    lines = [", ".join(f"{name} {value:.3f}" for name, value in values.items() if not np.isnan(value))]
    stamp = read_stamp(Path(score["path"]))
    if stamp is not None:
        sampler, method = stamp["settings"]["sampler"], stamp["settings"]["method"]
        steps, guidance = sampler["num_inference_steps"], sampler["guidance_scale"]
        options = ", ".join(f"{key} {value}" for key, value in method.items() if key != "kind" and value is not None)
        lines.append(f"{method['kind']}" + (f" ({options})" if options else ""))
        lines.append(f"{sampler['scheduler']}, {steps} steps, guidance {guidance:g}, seed {score['seed']}")
    return "\n".join(lines)


def as_data(path: Path, pixels: int) -> str:
    """A `data:` address of the picture as PNG, no wider than `pixels`."""
    image = load_picture(path)
    if max(image.size) > pixels:
        image.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_grid(rows: list[Row], cell: int = 128) -> Image.Image:
    """The grid as one picture: a line of column names, then rows with their prompt below."""
    gap, header, caption = 6, 22, 20
    columns = [c.title for c in rows[0].cells]
    width = len(columns) * (cell + gap) + gap
    sheet = Image.new("RGB", (width, header + gap + len(rows) * (cell + caption + gap)), "white")
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(14), ImageFont.load_default(12)
    for i, name in enumerate(columns):
        draw.text((gap + i * (cell + gap) + cell / 2, header / 2 + 2), name, fill="#222", font=font, anchor="mm")
    for j, row in enumerate(rows):
        top = header + gap + j * (cell + caption + gap)
        for i, one in enumerate(row.cells):
            image = load_picture(one.path)
            image = ImageOps.contain(image, (cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(image, (gap + i * (cell + gap) + (cell - image.width) // 2, top))
        draw.text((gap, top + cell + 3), row.prompt, fill="#555", font=small)
    return sheet
