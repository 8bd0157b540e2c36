"""OpenImages' annotation CSVs, read once in a stream and kept as one Parquet file for each first hex digit of the ImageID.

    <work>/tables/<kind>/<digit>.parquet   the good rows
    <work>/tables/<kind>/bad.parquet       picture and class that bad rows name: of a person who is in the picture, say
    <work>/tables/<kind>/counts.json       rows and bad_rows
"""

import csv
import json
import re
from collections import Counter, deque
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
}
#: Columns that may be empty; an empty or unreadable value anywhere else makes a bad row.
OPTIONAL = {"PredictedIoU", "OriginalLandingURL", "License", "Author", "OriginalSize", "OriginalMD5", "Rotation"}
#: Kinds with text in quotes. In the other files a quote is damage, and must not open a cell that goes on over the next rows.
QUOTED = {"metadata"}
NAMED = pa.schema({"ImageID": TEXT, "LabelName": TEXT})
IMAGE_ID, CLASS_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])"), re.compile(r"/\w/\w+")
LONGEST_HEADER = 1 << 16  # characters; a file that is no CSV may have a line end nowhere


class SplitTable:
    """A stage: item {"kind"} -> rows and bad rows of that CSV, and the files of `<folder>/<kind>/`."""

    def __init__(self, config: SourcesConfig, split: Split, cache: Path, folder: Path):
        self.sources, self.folder = Sources(config, split, cache), folder

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        done = self.folder / item["kind"] / "counts.json"
        if not done.exists():
            write_parts(self.sources.file(item["kind"]), item["kind"], done.parent)
        return item | json.loads(done.read_text())


def write_parts(path: Path, kind: str, folder: Path) -> None:
    """Split a CSV into the files of `folder`, beside and renamed."""
    beside = place_beside(folder)
    beside.mkdir(parents=True)
    counts: Counter[str] = Counter()
    schema = pa.schema(list(COLUMNS[kind].items()))
    with ExitStack() as stack:
        writers = {digit: stack.enter_context(pq.ParquetWriter(beside / f"{digit}.parquet", schema)) for digit in DIGITS}
        bad = stack.enter_context(pq.ParquetWriter(beside / "bad.parquet", NAMED))
        for table, named in read_csv(path, kind, counts):
            first = pc.utf8_slice_codeunits(table["ImageID"], 0, 1)
            for digit, writer in writers.items():
                writer.write_table(table.filter(pc.equal(first, digit)))
            bad.write_table(named)
    (beside / "counts.json").write_text(json.dumps(counts))
    commit(beside, folder)


def read_csv(path: Path, kind: str, counts: Counter[str]) -> Iterator[tuple[pa.Table, pa.Table]]:
    """A CSV's known columns in blocks: the good rows, and what the bad ones name (`NAMED`); `counts` gets rows and bad_rows.

    Raises ValueError that names the file for missing columns or a file that is no CSV.
    """
    columns = COLUMNS[kind]
    check_header(path, list(columns), quoted=kind in QUOTED)
    skipped: deque[str] = deque()  # filled by Arrow's threads, so the counting is done here

    def skip(row: pacsv.InvalidRow) -> str:
        skipped.append(row.text)
        return "skip"

    def named_by_skipped() -> pa.Table:
        lines = [skipped.popleft() for _ in range(len(skipped))]
        counts.update(rows=len(lines), bad_rows=len(lines))
        names = [(image, name) for line in lines for image in IMAGE_ID.findall(line) for name in CLASS_ID.findall(line)]
        return pa.table([[image for image, _ in names], [name for _, name in names]], schema=NAMED)

    parse = pacsv.ParseOptions(quote_char='"' if kind in QUOTED else False, newlines_in_values=kind in QUOTED, invalid_row_handler=skip)
    convert = pacsv.ConvertOptions(include_columns=list(columns), column_types=dict.fromkeys(columns, pa.binary()), strings_can_be_null=True)
    try:
        with pacsv.open_csv(path, pacsv.ReadOptions(block_size=1 << 22), parse, convert) as reader:
            for batch in reader:
                good, named = _typed(pa.table(batch), columns, counts)
                yield good, pa.concat_tables([named, named_by_skipped()])
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as a CSV: {error}") from error
    yield pa.schema(list(columns.items())).empty_table(), named_by_skipped()


def check_header(path: Path, columns: list[str], quoted: bool = True) -> None:
    """Raises ValueError that names the file and what it has in the place of `columns`."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        line = file.readline(LONGEST_HEADER)
    header = next(csv.reader([line], quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE), [])
    missing = [name for name in columns if name not in header]
    if missing:
        found = [name[:40] for name in header[:20]]
        raise ValueError(f"{path} lacks the columns {missing}; it has {found}: if it is another file, remove it, or name the right one in sources")


def _typed(table: pa.Table, columns: dict[str, pa.DataType], counts: Counter[str]) -> tuple[pa.Table, pa.Table]:
    """The good rows, and picture and class of the bad ones."""
    cast = {name: _text(table[name]) if kind == TEXT else _number(table[name]) for name, kind in columns.items()}
    typed = pa.table(cast, schema=pa.schema(list(columns.items())))
    good = known = pc.fill_null(pc.match_substring_regex(typed["ImageID"], "^[0-9a-f]{16}$"), False)
    for name in columns:
        if name not in OPTIONAL:
            good = pc.and_(good, pc.is_valid(typed[name]))
    counts.update(rows=len(typed), bad_rows=len(typed) - (pc.sum(good).as_py() or 0))
    named = typed.filter(pc.and_not(known, good))
    return typed.filter(good), named.select(NAMED.names) if "LabelName" in columns else NAMED.empty_table()


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
