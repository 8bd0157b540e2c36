"""`make inspect`: one self-contained HTML page of a split's shards: funnel, classes, histograms, a random contact sheet, the strangest first."""

import base64
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

from datamodules import pictures
from datamodules import shards as sharding
from datamodules.openimages.assemble import member_offsets
from datamodules.openimages.subjects import border_of
from datamodules.openimages.validate import picture_of
from datamodules.samples import BadSamples, read_shards
from moma_lightning.files import write_beside

TEMPLATE = Path(__file__).with_name("inspect.html.j2")
THUMBNAIL = 220


@dataclass
class InspectConfig:
    """shards: a folder with a manifest. split: None is the manifest's first. out: the page, beside the shards' folder by default.

    random, strange: how many samples the two contact sheets show. seed: of the random ones.
    """

    shards: str = "runs/openimages/data/shards"
    split: str | None = None
    out: str | None = None
    random: int = 24
    strange: int = 24
    seed: int = 0


def inspect(config: InspectConfig) -> None:
    """Write the page and print where it is. Raises FileNotFoundError where there is no finished split, ValueError for an unknown or empty one."""
    folder = Path(config.shards)
    manifest = sharding.read_manifest(folder)
    if not manifest:
        raise FileNotFoundError(f"{folder / sharding.MANIFEST} is missing: {folder} is no folder of finished shards")
    split = config.split or next(iter(manifest))
    if split not in manifest:
        raise ValueError(f"{folder} has no split {split!r}; it has {list(manifest)}")
    if not manifest[split]["count"]:
        raise ValueError(f"{folder}: the split {split!r} has no samples")
    page = render(folder, split, manifest[split], config)
    path = Path(config.out) if config.out else folder.parent / f"inspect-{split}.html"
    write_beside(path, lambda beside: beside.write_text(page, encoding="utf-8"))
    print(f"{path}: {manifest[split]['count']} triplets")


def render(folder: Path, split: str, part: dict[str, Any], config: InspectConfig) -> str:
    index = read_index(folder, part)
    odd = strangeness(index)
    strangest = index.assign(why=odd.idxmax(axis=1), odd=odd.max(axis=1)).sort_values(["odd", "key"], ascending=[False, True])[: config.strange]
    chosen = index.sample(min(config.random, len(index)), random_state=config.seed)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        split=split, part=part, funnel=[line for line in part.get("funnel", ()) if line["count"]], classes=bars(index.label.value_counts().to_dict()),
        histograms={"area of the subject, share of the picture": histogram(index.area, np.linspace(0, 1, 21)),
                    "length of the caption, words": histogram(index.caption.str.split().str.len(), np.arange(0, 32, 2)),
                    "longer side, pixels": histogram(index[["width", "height"]].max(axis=1), np.arange(0, 1153, 128))},
        sheets={"The strangest": cards(folder, strangest), "At random": cards(folder, chosen)})


def read_index(folder: Path, part: dict[str, Any]) -> pd.DataFrame:
    """A split's index; of shards that come without one (the mini world's), what the page needs of it, read from them."""
    if "index" in part:
        return pd.read_parquet(folder / part["index"])
    return pd.DataFrame([line for name in part["shards"] for line in described(folder / name)])


def described(shard: Path) -> Iterator[dict[str, Any]]:
    """Raises BadSampleError for a sample that cannot be read."""
    places = member_offsets(shard)
    for sample in read_shards([str(shard)], BadSamples(shard, "raise")):
        inside = np.asarray(pictures.open_mask(sample["mask.png"])) > 0
        width, height = pictures.open_picture(picture_of(sample)).size
        yield json.loads(sample["json"]) | {"key": sample["__key__"], "shard": shard.name, "width": width, "height": height,
                                            "area": inside.mean(), "border": border_of(inside)} | places[sample["__key__"]]


def strangeness(index: pd.DataFrame) -> pd.DataFrame:
    """How far each sample is from the median in each respect, in the larger of the median and the mean deviation: the median's may be 0."""
    values = pd.DataFrame({
        "subject's size": np.log(index.area), "at the border": index.border, "caption's length": index.caption.str.split().str.len(),
        "words taken out": index.caption_full.str.split().str.len() - index.caption.str.split().str.len(),
        "shape of the picture": np.log(index.width / index.height), "rare class": -np.log(index.label.map(index.label.value_counts())),
    })
    away = (values - values.median()).abs()
    return away / away.median().clip(lower=away.mean() + 1e-9)


def cards(folder: Path, rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [row | {"image": outlined(folder, row), "why": row.get("why", "")} for row in rows.to_dict("records")]


def outlined(folder: Path, row: dict[str, Any]) -> str:
    """A sample's picture with its mask's outline, small, as a data URL; read from its shard by offset."""
    with (folder / row["shard"]).open("rb") as file:
        picture, mask = (pictures.open_picture(member(file, int(row["picture_offset"]))), pictures.open_mask(member(file, int(row["mask_offset"]))))
    for image in (picture, mask):
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    inside = mask.point(lambda v: 255 if v > 127 else 0)
    outline = np.asarray(inside.filter(ImageFilter.MaxFilter(3))) != np.asarray(inside.filter(ImageFilter.MinFilter(3)))
    picture.paste((255, 0, 90), mask=Image.fromarray((outline * 255).astype(np.uint8)))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def member(file: Any, offset: int) -> bytes:
    """A tar member's bytes by the offset of its content: its length stands in the header before it."""
    file.seek(offset - tarfile.BLOCKSIZE)
    header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape")
    return file.read(header.size)


def histogram(values: pd.Series, edges: np.ndarray) -> list[dict[str, Any]]:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return bars({f"{a:g} to {b:g}": int(n) for a, b, n in zip(edges, edges[1:], counts, strict=False)})


def bars(counts: dict[str, int]) -> list[dict[str, Any]]:
    most = max(counts.values(), default=1) or 1
    return [{"name": name, "count": count, "percent": 100 * count / most} for name, count in counts.items()]
