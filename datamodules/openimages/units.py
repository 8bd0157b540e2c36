"""A unit: a few hundred pictures that are fetched, cut down to subjects and captioned together, and finished or not as one.

    <work>/units/00012.parquet      the candidates (candidates.py), in the seed's order
    <work>/pictures/00012.parquet   every one of them with picture and mask, or the reason why not
    <work>/samples/00012.parquet    the same with captions

What a unit becomes depends on it alone, so neither processes nor crashes change a byte of the result.
"""

import heapq
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datamodules import pictures
from datamodules.openimages.candidates import BOX
from datamodules.openimages.captions import CaptionError, CaptionRules, finish
from datamodules.openimages.config import CaptionConfig, SelectConfig, ShardConfig, SourcesConfig, Split
from datamodules.openimages.sources import Sources
from datamodules.openimages.subjects import RejectedError, Subject, fetch, fit_mask, largest, read_picture, read_subject
from moma_lightning.files import write_beside

ROWS_AT_ONCE = 64  # rows of a Parquet row group, and so what a reader holds in memory

SCHEMA = pa.schema({
    "key": pa.string(), "image_id": pa.string(), "label": pa.string(), "class_id": pa.string(), "box": pa.list_(pa.float64()),
    "predicted_iou": pa.float64(), "license": pa.string(), "author": pa.string(), "url": pa.string(), "given_caption": pa.binary(),
    "reason": pa.string(), "detail": pa.string(), "note": pa.string(), "area": pa.float64(), "border": pa.float64(),
    "width": pa.int32(), "height": pa.int32(), "hash": pa.uint64(), "picture": pa.binary(), "mask": pa.binary(),
    "caption_full": pa.string(), "caption": pa.string(),
})


def path_of(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.parquet"


def write_units(candidates: Sequence[Path], folder: Path, pictures_each: int) -> tuple[int, int]:
    """Merge files of candidates, each in the seed's order, and cut them into units of `pictures_each` pictures (the last one may be smaller).

    Returns how many units and how many candidates there are. A row group of each file is in memory, and one unit.
    """
    rows = heapq.merge(*map(_candidates_of, candidates), key=lambda row: (row["order"], row["MaskPath"]))
    pictures = (list(masks) for _, masks in groupby(rows, key=lambda row: row["ImageID"]))
    units = count = 0
    while unit := list(islice(pictures, pictures_each)):
        part = pa.Table.from_pylist([row for masks in unit for row in masks])
        write_beside(path_of(folder, units), partial(pq.write_table, part))
        units, count = units + 1, count + len(part)
    return units, count


def _candidates_of(path: Path) -> Iterator[dict[str, Any]]:
    for rows in read_rows(path):
        yield from rows


class PictureStage:
    """A stage: item {"unit"} -> the same; writes `<work>/pictures/`."""

    def __init__(self, sources: SourcesConfig, split: Split, cache: Path, work: Path, select: SelectConfig, shards: ShardConfig):
        self.sources, self.work = Sources(sources, split, cache), work
        self.select, self.shards = select, shards

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        number = item["unit"]
        samples, target = path_of(self.work / "samples", number), path_of(self.work / "pictures", number)
        if self._is_done(samples):
            return item
        samples.unlink(missing_ok=True)
        if not self._is_done(target):
            candidates = pq.read_table(path_of(self.work / "units", number)).to_pylist()
            rows = list(self.rows(candidates))
            write_rows(target, rows)
            for row in rows:
                self.sources.forget(row["image_id"])
        return item

    def _is_done(self, path: Path) -> bool:
        """What a run with `on_unreachable: skip` went without, one with `raise` fetches."""
        if not path.exists() or self.sources.config.fetch.on_unreachable == "skip":
            return path.exists()
        reasons = pq.read_table(path, columns=["reason"])["reason"]
        return not pc.any(pc.ends_with(reasons, "_unreachable")).as_py()

    def rows(self, candidates: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One row for each candidate, in their order; downloads run ahead in threads."""
        chosen = {image: self._choose(list(rows)) for image, rows in groupby(candidates, key=lambda row: row["ImageID"])}
        wanted = [subjects[0].row for subjects, _ in chosen.values() if subjects]
        with ThreadPoolExecutor(self.sources.config.fetch.threads) as pool:
            fetched = {row["ImageID"]: pool.submit(fetch, row, self.sources) for row in wanted}
            try:
                for image, (subjects, rejected) in chosen.items():
                    taken = self._take(subjects, fetched.pop(image).result) if subjects else []
                    yield from sorted([*taken, *rejected], key=lambda row: row["key"])
            finally:
                pool.shutdown(cancel_futures=True)

    def _choose(self, rows: list[dict[str, Any]]) -> tuple[list[Subject], list[dict[str, Any]]]:
        subjects, rejected = [], []
        for row in rows:
            try:
                subjects.append(read_subject(row, self.sources, self.select))
            except RejectedError as error:
                rejected.append(row_of(row) | _why(error))
        kept, rest = largest(subjects, self.select.subjects_per_picture)
        return kept, [*rejected, *(_described(s) | {"reason": "not_the_largest"} for s in rest)]

    def _take(self, subjects: list[Subject], fetched: Any) -> list[dict[str, Any]]:
        try:
            rotation = subjects[0].row["Rotation"]
            picture = read_picture(fetched(), rotation, self.select, self.shards)
        except RejectedError as error:
            return [_described(subject) | _why(error) for subject in subjects]
        common = {"picture": picture.content, "width": picture.size[0], "height": picture.size[1], "hash": picture.hash, "note": picture.note}
        rows = []
        for subject in subjects:
            try:
                mask = fit_mask(subject.mask, picture, self.select)
                turned = {"box": box_of(mask)} if picture.orientation != 1 or picture.rotation else {}
                rows.append(_described(subject) | common | turned | {"mask": mask})
            except RejectedError as error:
                rows.append(_described(subject) | _why(error))
        return rows


class CaptionStage:
    """A stage: item {"unit"} -> the same; writes `<work>/samples/`, removes `pictures/`."""

    def __init__(self, config: CaptionConfig, work: Path):
        self.config, self.rules, self.work = config, CaptionRules.of(config), work
        self.captioner: Any = None

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        target, source = path_of(self.work / "samples", item["unit"]), path_of(self.work / "pictures", item["unit"])
        if not target.exists():
            write_rows(target, (row for rows in read_rows(source) for row in self.captioned(rows)))
        source.unlink(missing_ok=True)
        return item

    def captioned(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with `caption` and `caption_full`, or a reason."""
        waiting = [row for row in rows if row["reason"] is None]
        without = [row for row in waiting if row["given_caption"] is None]
        raw: dict[str, str | bytes] = {row["key"]: row["given_caption"] for row in waiting}
        for start in range(0, len(without), self.config.batch_size):
            part = without[start : start + self.config.batch_size]
            raw |= zip((row["key"] for row in part), self._captions(part), strict=True)
        return [row | self._finished(raw[row["key"]], row["label"]) if row["reason"] is None else row for row in rows]

    def _captions(self, rows: list[dict[str, Any]]) -> list[str]:
        if self.captioner is None:
            from datamodules.openimages.captioners import build_captioner  # torch and transformers, only where they are needed

            self.captioner = build_captioner(self.config)
        captions = self.captioner([pictures.open_picture(row["picture"]) for row in rows])
        if len(captions) != len(rows):
            raise ValueError(f"{self.config.captioner} gave {len(captions)} captions for {len(rows)} pictures")
        return captions

    def _finished(self, raw: str | bytes, label: str) -> dict[str, Any]:
        try:
            full, caption = finish(raw, label, self.rules)
            return {"caption_full": full, "caption": caption}
        except CaptionError as error:
            return {"reason": str(error), "detail": repr(raw)[:200], "picture": None, "mask": None}


def write_rows(path: Path, rows: Any) -> None:
    """Rows to Parquet, a row group at a time."""
    def write(beside: Path) -> None:
        with pq.ParquetWriter(beside, SCHEMA, compression="none") as writer:
            for part in _parts(rows):
                writer.write_table(pa.Table.from_pylist(part, SCHEMA))
    write_beside(path, write)


def read_rows(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Rows of a Parquet file, a row group at a time."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group).to_pylist()


def _parts(rows: Any) -> Iterator[list[dict[str, Any]]]:
    rows = iter(rows)
    while part := list(islice(rows, ROWS_AT_ONCE)):
        yield part


def row_of(candidate: dict[str, Any]) -> dict[str, Any]:
    box = [candidate[side] for side in BOX]
    names = {"image_id": "ImageID", "class_id": "LabelName", "predicted_iou": "PredictedIoU", "license": "License",
             "author": "Author", "url": "OriginalLandingURL", "label": "label", "given_caption": "given_caption"}
    values = {name: candidate[column] for name, column in names.items()}
    key = candidate["MaskPath"].removesuffix(".png")
    return dict.fromkeys(SCHEMA.names) | values | {"key": key, "box": None if None in box else box}


def box_of(mask: bytes) -> list[float]:
    """Left, right, top and bottom edge of what a mask covers, as shares of its sides: the order of the annotations' boxes."""
    image = pictures.open_mask(mask)
    left, top, right, bottom = image.getbbox() or (0, 0, 0, 0)
    return [round(edge / side, 6) for edge, side in ((left, image.width), (right, image.width), (top, image.height), (bottom, image.height))]


def _described(subject: Subject) -> dict[str, Any]:
    return row_of(subject.row) | {"area": subject.area, "border": subject.border}


def _why(error: RejectedError) -> dict[str, Any]:
    return {"reason": error.reason, "detail": str(error)[:200]}
