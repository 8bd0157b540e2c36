"""Reads back what an offline wandb run wrote: protobuf records in LevelDB's log format (32 KiB blocks, each part with a 7-byte header)."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK, FULL, LAST = 7, 32768, 1, 4


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    data, position, parts = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def offline_run(path: Path) -> dict:
    """Project, group, tags, config and what was logged of one `run-*.wandb` file."""
    found: dict = {"config": {}, "metrics": {}}
    for record in records(path):
        if record.HasField("run"):
            found |= {"project": record.run.project, "group": record.run.run_group, "tags": list(record.run.tags)}
        for item in [*record.run.config.update, *record.config.update]:
            found["config"][item.key] = json.loads(item.value_json)
        for item in record.history.item:
            found["metrics"]["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return found
