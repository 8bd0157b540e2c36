"""The data factory's speed and memory on rendered pictures in the bucket's layout: `python -m experiments.benchmarks.factory --rows 1000 4000`.

For each size a bucket is drawn and built in processes of their own; a line a step says processor time a row, rows a second of one core
that does nothing else (from processor time, so other programs hardly matter), rows a second of all workers together on the clock, and the
largest resident memory until then. Captions come from a file and pictures from this disk: BLIP-2 and downloads are not measured.
"""

import argparse
import functools
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from datamodules.openimages import assemble
from datamodules.openimages.build import BuildConfig, Builder, deciding
from datamodules.openimages.candidates import BOX, MASK_BOX, ROWS_AT_ONCE, ordered
from datamodules.openimages.config import RunConfig, SelectConfig, ShardConfig, SourcesConfig
from datamodules.openimages.engine import Engine, Item, Stage
from datamodules.openimages.sources import DIGITS
from datamodules.openimages.units import path_of, read_rows, row_of, write_rows, write_units
from moma_lightning.files import write_beside, write_json

#: The factory's stages and its own process's steps, in their order, as the table calls them.
STEPS = {"start": "all imported", "SplitTable": "annotations to tables", "JoinDigit": "masks joined and filtered", "units": "cut into units",
         "PictureStage": "pictures and masks checked", "CaptionStage": "captions filtered", "choose": "near-duplicates out, chosen",
         "ShardStage": "shards written", "finish": "index and manifest"}
#: Those of the main process, whatever the number of workers.
ALONE = ("start", "units", "choose", "finish")
GRAIN_FROM = 256  # pictures of this side and more get a photograph's grain: clean renderings decode too fast


def memory() -> float:
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now() -> tuple[float, float]:
    """Processor seconds of this process, and the clock's."""
    return time.process_time(), time.perf_counter()


def note(log: Path, step: str, started: tuple[float, float]) -> None:
    seconds, clock = (ended - began for ended, began in zip(now(), started, strict=True))
    with log.open("a") as file:
        file.write(json.dumps({"step": step, "seconds": seconds, "clock": clock, "megabytes": memory(), "process": os.getpid()}) + "\n")


def clocked(make: Callable[..., Callable[[Item], Item]], log: Path, *arguments: Any) -> Callable[[Item], Item]:
    """A stage's function that notes what each item took, wherever it runs."""
    name, started = getattr(make, "__name__", str(make)), now()
    function = make(*arguments)
    note(log, name, started)

    def run(item: Item) -> Item:
        started = now()
        result = function(item)
        note(log, name, started)
        return result

    return run


class ClockedEngine(Engine):
    def __init__(self, log: Path, workers: int | None):
        super().__init__(workers)
        self.log = log

    def run(self, items: Sequence[Item], stages: Sequence[Stage]) -> Iterator[Item]:
        return super().run(items, [replace(stage, make=functools.partial(clocked, stage.make, self.log)) for stage in stages])


def build(bucket: Path, out: Path, log: Path, workers: int) -> None:
    """One build, its own steps noted beside the stages'."""
    config = BuildConfig(
        out=str(out), sources=SourcesConfig(f"{bucket}/annotations", f"{bucket}/pictures", captions=f"{bucket}/captions.csv"),
        select=SelectConfig(min_side=32), shards=ShardConfig(), run=RunConfig(workers=workers),
    )
    for owner, name, step in ((Builder, "units", "units"), (assemble, "choose", "choose"), (Builder, "finish", "finish")):
        setattr(owner, name, _noted(getattr(owner, name), log, step))
    note(log, "start", now())
    with ClockedEngine(log, workers) as engine:
        Builder(config, deciding(config), engine).build()


def _noted(function: Callable[..., Any], log: Path, step: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        started = now()
        result = function(*arguments, **options)
        note(log, step, started)
        return result

    return run


def draw(bucket: Path, rows: int, side: int) -> None:
    """A bucket of `rows` pictures with one good mask each."""
    from tests.miniature_bucket import Miniature, encode

    made = Miniature.drawn(rows, min(side, 96))
    if side >= GRAIN_FROM:
        rng = np.random.default_rng(0)
        grain = rng.normal(0, 4, (side, side, 3))
        for image_id, content in made.pictures.items():
            large = Image.open(io.BytesIO(content)).resize((side, side), Image.Resampling.BICUBIC)
            shifted = np.roll(grain, tuple(rng.integers(0, side, 2)), (0, 1))
            made.pictures[image_id] = encode(Image.fromarray((np.asarray(large) + shifted).clip(0, 255).astype(np.uint8)), "JPEG", quality=85)
        made.masks = {name: encode(Image.open(io.BytesIO(mask)).resize((side, side), 0)) for name, mask in made.masks.items()}
        for row in made.rows["metadata"]:
            row["OriginalSize"] = row["OriginalMD5"] = ""
    made.write(bucket)


def made_up(numbers: range, rng: np.random.Generator) -> pd.DataFrame:
    """Candidates of these numbers, as the join of the annotations leaves them."""
    texts = ("LabelName", "BoxID", "OriginalLandingURL", "License", "Author", "OriginalMD5", "label", "given_caption")
    ids = [f"{number:016x}" for number in numbers]
    columns = {"ImageID": ids, "MaskPath": [f"{i}_m01yrx_{i[-8:]}.png" for i in ids], **{name: [f"{name} of {i}" for i in ids] for name in texts},
               **{name: rng.random(len(ids)) for name in (*MASK_BOX, *BOX, "PredictedIoU", "OriginalSize", "Rotation")}}
    return pd.DataFrame(columns)


def listed(folder: Path, rows: int, log: Path) -> None:
    """What the main process does with the list of all masks, on `rows` good ones without pictures: there lies what grows with their number."""
    note(log, "start", now())
    rng, paths = np.random.default_rng(0), [folder / f"{digit}.parquet" for digit in DIGITS]
    for digit, path in enumerate(paths):
        numbers = range(rows * digit // len(paths), rows * (digit + 1) // len(paths))
        ordered(made_up(numbers, rng), 0).to_parquet(path, index=False, row_group_size=ROWS_AT_ONCE)
    started = now()
    units, _ = write_units(paths, folder / "units", RunConfig.unit)
    note(log, "units", started)
    for unit in range(units):
        part = pq.read_table(path_of(folder / "units", unit)).to_pylist()
        kept = {"caption": "a cat on a lawn", "caption_full": "a black cat on a lawn", "area": 0.2, "border": 0.0, "note": "", "width": 64, "height": 64}
        write_rows(path_of(folder / "samples", unit), [row_of(row) | kept | {"hash": int(rng.integers(2**63))} for row in part])
    started = now()
    items = assemble.shard_items(assemble.choose(assemble.read_light(folder / "samples", units), None, 3), "train", 1000)
    note(log, "choose", started)
    for item in items:
        keys = {key for part in item["keys"].values() for key in part}
        lines = [assemble.describe(row) | {"key": row["key"]} for unit in item["keys"] for part in read_rows(path_of(folder / "samples", int(unit)))
                 for row in part if row["key"] in keys]
        path = folder / "index" / f"{item['shard']}.parquet"
        write_beside(path, functools.partial(pq.write_table, pa.Table.from_pylist(lines)))
    started = now()
    assemble.write_index(folder, folder, "train", [item["shard"] for item in items])
    note(log, "finish", started)


def summary(log: Path, rows: int, workers: int = 0) -> dict[str, dict[str, float]]:
    """By step: processor milliseconds a row, rows a second of one core and of all workers at work, largest memory of a process until then in MB."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    sums: dict[str, dict[str, float]] = defaultdict(lambda: {"seconds": 1e-9, "clock": 1e-9, "megabytes": 0.0})
    for line in lines:
        step = sums[line["step"]]
        step["seconds"] += line["seconds"]
        step["clock"] += line["clock"]
        step["megabytes"] = max(step["megabytes"], line["megabytes"])
    return {name: {"ms": 1000 * step["seconds"] / rows, "rows_a_second": rows / step["seconds"], "megabytes": step["megabytes"],
                   "rows_a_second_together": rows / step["clock"] * (1 if name in ALONE else max(workers, 1))}
            for name in STEPS if (step := sums.get(name))}


def table(rows: int, workers: int | None, found: dict[str, dict[str, float]], wall: float) -> str:
    lines = [f"{rows} rows, {workers or 'no'} workers of Ray, {wall:.0f} s on the clock",
             f"{'step':<30} {'ms a row':>9} {'rows/s':>9} {'together':>9} {'peak MB':>9}"]
    for step, line in found.items():
        ms, alone, together, megabytes = (line[name] for name in ("ms", "rows_a_second", "rows_a_second_together", "megabytes"))
        lines.append(f"{STEPS[step]:<30} {ms:9.3f} {alone:9.0f} {together:9.0f} {megabytes:9.0f}")
    return "\n".join([*lines, f"{'all':<30} {sum(line['ms'] for line in found.values()):9.3f}"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 4000])
    parser.add_argument("--listed", type=int, nargs="*", default=[1000, 100_000], help="rows of the main process's steps alone, without pictures")
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="of Ray; 0: one process without Ray")
    parser.add_argument("--side", type=int, default=64, help="of the pictures, in pixels; OpenImages' are 1024 on their longer side")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where `bench-factory` is made, and removed at the end")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-factory.json"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # in a process of its own: draw or build
    args = parser.parse_args(arguments)
    if not args.one:
        args.folder /= "bench-factory"  # one of its own: it is removed whole
    bucket, shards, log = args.folder / "bucket", args.folder / "shards", args.folder / "log.jsonl"
    if args.one:
        what, rows = args.one[0], int(args.one[1])
        alone = {"draw": lambda: draw(bucket, rows, args.side), "listed": lambda: listed(args.folder, rows, log.absolute()),
                 "build": lambda: build(bucket.absolute(), shards, log.absolute(), args.workers[0])}
        alone[what]()
        return
    results: list[dict[str, Any]] = []
    for rows in args.listed:
        shutil.rmtree(args.folder, ignore_errors=True)
        args.folder.mkdir(parents=True)
        print("without pictures: ", end="")
        report(results, args, rows, None, _alone("listed", rows, args, 0))
    for rows in args.rows:
        shutil.rmtree(args.folder, ignore_errors=True)
        _alone("draw", rows, args, 0)
        for workers in args.workers:
            shutil.rmtree(shards, ignore_errors=True)
            log.unlink(missing_ok=True)
            report(results, args, rows, workers, _alone("build", rows, args, workers))
    shutil.rmtree(args.folder)


def report(results: list[dict[str, Any]], args: argparse.Namespace, rows: int, workers: int | None, wall: float) -> None:
    found = summary(args.folder / "log.jsonl", rows, workers or 0)
    print(table(rows, workers, found, wall), flush=True)
    results.append({"rows": rows, "workers": workers, "side": args.side, "wall": wall, "steps": found})
    write_json(args.out, results)


def _alone(what: str, rows: int, args: argparse.Namespace, workers: int) -> float:
    """Seconds on the clock of one part in a process of its own, whose memory is then its own."""
    command = [sys.executable, "-m", "experiments.benchmarks.factory", "--one", what, str(rows), "--side", str(args.side),
               "--folder", str(args.folder), "--workers", str(workers)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
