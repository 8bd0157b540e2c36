"""Captions that were made elsewhere: a CSV or Parquet of `ImageID,caption`, split by the ImageID's first digit."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from datamodules.openimages.sources import DIGITS
from datamodules.openimages.tables import check_header
from moma_lightning.files import commit, place_beside

SCHEMA = pa.schema({"ImageID": pa.string(), "caption": pa.binary()})


def write_captions(path: Path, folder: Path) -> dict[str, int]:
    """Split a captions file into `folder`; returns rows and bad rows (no ImageID, or no caption). Text stays bytes: see `captions.tidy`.

    Raises ValueError that names a file that is neither, or lacks a column.
    """
    done = folder / "counts.json"
    if not done.exists():
        table = _read(path)
        good = pc.and_(pc.fill_null(pc.match_substring_regex(table["ImageID"], "^[0-9a-f]{16}$"), False), pc.is_valid(table["caption"]))
        counts = Counter(rows=len(table), bad_rows=len(table) - (pc.sum(good).as_py() or 0))
        table = table.filter(good)
        first = pc.utf8_slice_codeunits(table["ImageID"], 0, 1)
        beside = place_beside(folder)
        beside.mkdir(parents=True)
        for digit in DIGITS:
            pq.write_table(table.filter(pc.equal(first, digit)), beside / f"{digit}.parquet")
        (beside / "counts.json").write_text(json.dumps(counts))
        commit(beside, folder)
    return json.loads(done.read_text())


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path, columns=SCHEMA.names)
        else:
            check_header(path, SCHEMA.names)
            convert = pacsv.ConvertOptions(include_columns=SCHEMA.names, column_types=dict.fromkeys(SCHEMA.names, pa.binary()))
            table = pacsv.read_csv(path, parse_options=pacsv.ParseOptions(newlines_in_values=True), convert_options=convert)
        ids = pa.array([i.decode("ascii", "replace") if isinstance(i, bytes) else i for i in table["ImageID"].to_pylist()], pa.string())
        return pa.table({"ImageID": ids, "caption": table["caption"].cast(pa.binary())}, schema=SCHEMA)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as captions, a CSV or Parquet with the columns {SCHEMA.names}: {error}") from error
