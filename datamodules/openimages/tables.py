"""OpenImages' annotation CSVs, read once in a stream and kept as one Parquet file for each first hex digit of the ImageID."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from datamodules.openimages.config import SourcesConfig, Split
from datamodules.openimages.sources import DIGITS, Sources
from moma_lightning.files import commit, place_beside

TEXT, NUMBER = pa.string(), pa.float64()

#: Columns that are read, of whatever columns a file has, by the kind's name in SourcesConfig.
COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "masks": {"MaskPath": TEXT, "ImageID": TEXT, "LabelName": TEXT, "BoxID": TEXT, "BoxXMin": NUMBER, "BoxXMax": NUMBER,
              "BoxYMin": NUMBER, "BoxYMax": NUMBER, "PredictedIoU": NUMBER},
    "boxes": {"ImageID": TEXT, "LabelName": TEXT, "XMin": NUMBER, "XMax": NUMBER, "YMin": NUMBER, "YMax": NUMBER,
              "IsGroupOf": NUMBER, "IsDepiction": NUMBER, "IsInside": NUMBER},
    "image_labels": {"ImageID": TEXT, "LabelName": TEXT, "Confidence": NUMBER},
    "metadata": {"ImageID": TEXT, "OriginalLandingURL": TEXT, "License": TEXT, "Author": TEXT, "OriginalSize": NUMBER,
                 "OriginalMD5": TEXT, "Rotation": NUMBER},
}  # fmt: skip
#: Columns that may be empty; an empty or unreadable value anywhere else makes a bad row.
OPTIONAL = {"PredictedIoU", "OriginalLandingURL", "License", "Author", "OriginalSize", "OriginalMD5", "Rotation"}


class SplitTable:
    """A stage: item {"kind"} -> rows and bad rows of that CSV, and `<folder>/<kind>/<digit>.parquet`."""

    def __init__(self, config: SourcesConfig, split: Split, cache: Path, folder: Path):
        self.sources, self.folder = Sources(config, split, cache), folder

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        done = self.folder / item["kind"] / "counts.json"
        if not done.exists():
            write_parts(self.sources.file(item["kind"]), item["kind"], done.parent)
        return item | json.loads(done.read_text())


def write_parts(path: Path, kind: str, folder: Path) -> None:
    """Split a CSV by the ImageID's first digit into `folder`, beside and renamed."""
    beside = place_beside(folder)
    beside.mkdir(parents=True)
    counts: Counter[str] = Counter()
    schema = pa.schema(list(COLUMNS[kind].items()))
    with ExitStack() as stack:
        writers = {digit: stack.enter_context(pq.ParquetWriter(beside / f"{digit}.parquet", schema)) for digit in DIGITS}
        for table in read_csv(path, kind, counts):
            first = pc.utf8_slice_codeunits(table["ImageID"], 0, 1)
            for digit, writer in writers.items():
                writer.write_table(table.filter(pc.equal(first, digit)))
    (beside / "counts.json").write_text(json.dumps(counts))
    commit(beside, folder)


def read_csv(path: Path, kind: str, counts: Counter[str]) -> Iterator[pa.Table]:
    """A CSV's known columns in blocks, bad rows left out; `counts` gets rows and bad_rows.

    Raises ValueError that names the file for missing columns or a file that is no CSV.
    """
    columns = COLUMNS[kind]
    check_header(path, list(columns))

    def skip(_: pacsv.InvalidRow) -> str:
        counts["rows"] += 1
        counts["bad_rows"] += 1
        return "skip"

    parse = pacsv.ParseOptions(newlines_in_values=kind == "metadata", invalid_row_handler=skip)
    convert = pacsv.ConvertOptions(include_columns=list(columns), column_types=dict.fromkeys(columns, pa.binary()), strings_can_be_null=True)
    try:
        with pacsv.open_csv(path, pacsv.ReadOptions(block_size=1 << 22), parse, convert) as reader:
            for batch in reader:
                yield _typed(pa.table(batch), columns, counts)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as a CSV: {error}") from error


def check_header(path: Path, columns: list[str]) -> None:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next(csv.reader(file), [])
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"{path} lacks the columns {missing}; it has {header[:20]}")


def _typed(table: pa.Table, columns: dict[str, pa.DataType], counts: Counter[str]) -> pa.Table:
    cast = {name: _text(table[name]) if kind == TEXT else _number(table[name]) for name, kind in columns.items()}
    typed = pa.table(cast, schema=pa.schema(list(columns.items())))
    good = pc.fill_null(pc.match_substring_regex(typed["ImageID"], "^[0-9a-f]{16}$"), False)
    for name in columns:
        if name not in OPTIONAL:
            good = pc.and_(good, pc.is_valid(typed[name]))
    counts["rows"] += len(typed)
    counts["bad_rows"] += len(typed) - (pc.sum(good).as_py() or 0)
    return typed.filter(good)


def _number(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return _or_one_by_one(column, NUMBER, lambda values: pd.to_numeric(pd.Series(values, dtype=object), errors="coerce"))


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return _or_one_by_one(column, TEXT, lambda values: [v if v is None else v.decode(errors="replace") for v in values])


def _or_one_by_one(column: pa.ChunkedArray, kind: pa.DataType, convert: Callable[[list[Any]], Any]) -> pa.ChunkedArray:
    """Arrow's fast conversion, and value by value only where a block has something unreadable in it."""
    try:
        found = column.cast(TEXT) if kind == TEXT else column.cast(TEXT).cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        found = pa.chunked_array([pa.array(convert(column.to_pylist()), kind, from_pandas=True)])
    return found if kind == TEXT else pc.if_else(pc.is_finite(found), found, pa.scalar(None, kind))
