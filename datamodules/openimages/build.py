"""`make data EXP=openimages`: raw OpenImages V7 to filtered, captioned triplet shards, resumable at any moment.

    <out>/train-00000.tar ...     shards (datamodules/shards.py)
    <out>/train-index.parquet     one row a triplet
    <out>/manifest.json           counts at each filter, shards with their sha256, versions, configuration, seed
    <out>/work/                   what was fetched and what is half done; may be removed when the split is finished
"""

import importlib.metadata
import json
import math
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from datamodules import shards as sharding
from datamodules.openimages import assemble
from datamodules.openimages.candidates import JoinDigit
from datamodules.openimages.captions import CaptionRules
from datamodules.openimages.config import CaptionConfig, RunConfig, SelectConfig, ShardConfig, SourcesConfig, Split
from datamodules.openimages.engine import Engine, Stage
from datamodules.openimages.fetch import is_url
from datamodules.openimages.given_captions import write_captions
from datamodules.openimages.sources import DIGITS, Sources
from datamodules.openimages.tables import COLUMNS, SplitTable
from datamodules.openimages.units import CaptionStage, PictureStage, write_units
from moma_lightning.digests import content_digest
from moma_lightning.dotted import flat
from moma_lightning.files import write_beside, write_json

#: Raised when the same configuration would give other bytes: what an older version left half done is then not gone on with.
FORMAT = 5
VERSIONED = ("pillow", "numpy", "pyarrow", "pandas", "webdataset", "transformers", "torch", "ray")


@dataclass
class BuildConfig:
    """What decides the shards' content, and with `run` how they are made.

    out: folder of the shards. limit: triplets, of all there are without. seed: of the pictures' order.
    """

    out: str = "runs/openimages/data/shards"
    split: Split = "train"
    limit: int | None = None
    seed: int = 0
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    shards: ShardConfig = field(default_factory=ShardConfig)
    run: RunConfig = field(default_factory=RunConfig)


def build(config: BuildConfig) -> dict[str, Any]:
    """Write a split's shards, index and manifest part, which is returned. What a finished run of the same configuration left stays.

    What one of other options left is replaced where it is the same with a smaller limit, or by `run.overwrite`.
    Raises ValueError or FileNotFoundError that name what is wrong with the configuration or a file, UnreachableError for servers.
    """
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit must be at least 1, not {config.limit}")
    out = Path(config.out)
    for left in (out / "work").glob(f".{config.split}-*.removing"):
        shutil.rmtree(left)
    decides = deciding(config)
    part = sharding.read_manifest(out).get(config.split)
    if part is not None and part.get("config") == decides and _is_whole(out, part):
        print(f"{config.split}: {part['count']} triplets under {out} are finished already")
        return part
    if part is not None and not config.run.overwrite:
        _require_same_or_more(out, config.split, part.get("config", {}), decides)
    CaptionRules.of(config.captions)
    with Engine(config.run.workers, config.run.address) as engine:
        return Builder(config, decides, engine).build()


class Builder:
    """The steps, in order. Each leaves files by which the next run of the same configuration knows that it is done."""

    def __init__(self, config: BuildConfig, decides: dict[str, Any], engine: Engine):
        self.config, self.decides, self.engine = with_absolute_paths(config), decides, engine
        self.out = Path(config.out).absolute()
        self.cache = self.out / "work" / "sources"
        # A larger limit, shards of another size, or another answer to unreachable servers go on from the same work.
        identity = {key: value for key, value in decides.items() if key not in ("limit", "shards", "on_unreachable")}
        identity |= {"pictures": [config.shards.max_side, config.shards.quality], "unit": config.run.unit}
        self.work = self.out / "work" / f"{config.split}-{_digest(identity)}"

    def build(self) -> dict[str, Any]:
        sources = Sources(self.config.sources, self.config.split, self.cache)
        hierarchy, classes, captions = sources.file("hierarchy"), sources.file("classes"), sources.captions_file()
        tables = self.tables(captions)
        sources.prepare()
        reasons = self.candidates(hierarchy, classes)
        units, candidates = self.units()
        gone = Counter(bad_row=tables["masks"].get("bad_rows", 0)) + reasons
        if not units:
            raise self.nothing_left(gone)
        chosen, looked_at = self.samples(units)
        if not len(chosen):
            raise self.nothing_left(gone + chosen.reasons)
        self._remove_others()
        shards = self.shards(chosen)
        funnel = self.funnel(tables, reasons, candidates, chosen, looked_at)
        return self.finish(chosen, shards, tables, funnel)

    def tables(self, captions: Path | None) -> dict[str, Any]:
        kinds = [{"kind": kind} for kind in COLUMNS]
        arguments = (self.config.sources, self.config.split, self.cache, self.work / "tables")
        counts = {item.pop("kind"): item for item in self.engine.run(kinds, [Stage(SplitTable, arguments)])}
        if captions is not None:
            counts["captions"] = write_captions(captions, self.work / "tables" / "captions")
        return {kind: counts[kind] for kind in [*COLUMNS, *(["captions"] if captions else [])]}

    def candidates(self, hierarchy: Path, classes: Path) -> Counter[str]:
        arguments = (self.work / "tables", self.work / "ordered", hierarchy, classes, self.config.select, self.config.seed)
        found = list(self.engine.run([{"digit": d} for d in DIGITS], [Stage(JoinDigit, arguments)]))
        order = sorted(found, key=lambda item: item["digit"])
        return sum((Counter(item["reasons"]) for item in order), Counter[str]())

    def units(self) -> tuple[int, int]:
        """How many units and how many candidates there are."""
        done = self.work / "units.json"
        if not done.exists():
            counts = write_units([self.work / "ordered" / f"{digit}.parquet" for digit in DIGITS], self.work / "units", self.config.run.unit)
            write_json(done, counts)
        units, count = json.loads(done.read_text())
        return units, count

    def samples(self, units: int) -> tuple[assemble.Chosen, int]:
        """Work through units until the limit is reached: their samples, and how many candidates were looked at for them."""
        config, done, kept, wave = self.config, 0, 0, units
        while True:
            if config.limit is not None:  # a few more than will do by what units gave so far: each wave starts captioners anew
                each = kept / done if done else config.run.unit * 2 / 3
                wave = max(config.run.captioners, math.ceil(1.05 * (config.limit - kept) / max(each, 1)))
            upto = min(units, done + wave)
            self._work_through(range(done, upto))
            done = upto
            chosen = assemble.choose(assemble.read_light(self.work / "samples", done), config.limit, config.select.near_duplicate_bits)
            if done == units or (config.limit is not None and len(chosen) == config.limit):
                return chosen, len(chosen) + sum(chosen.reasons.values())
            kept = len(chosen)

    def nothing_left(self, gone: Counter[str]) -> ValueError:
        """What an empty result is reported with: which filter took how many masks."""
        took = ", ".join(f"{reason} {count}" for reason, count in gone.most_common())
        where = f"{Sources(self.config.sources, self.config.split, self.cache).name('masks')} of {self.config.sources.annotations}"
        return ValueError(f"no triplet of {self.config.split} is left: " + (f"masks that went, by the reason: {took}" if took else f"{where} has no rows"))

    def _work_through(self, units: range) -> None:
        config = self.config
        pictures = Stage(PictureStage, (config.sources, config.split, self.cache, self.work, config.select, config.shards))
        given = config.sources.captions is not None
        captions = Stage(CaptionStage, (config.captions, self.work), None if given else config.run.captioners, config.run.gpus_each)
        for number, _ in enumerate(self.engine.run([{"unit": unit} for unit in units], [pictures, captions]), 1):
            print(f"\r{config.split}: {units.start + number} units of {config.run.unit} pictures", end="", flush=True)
        print()

    def shards(self, chosen: assemble.Chosen) -> dict[str, Any]:
        items = assemble.shard_items(chosen, self.config.split, self.config.shards.samples_per_shard)
        written = self.engine.run(items, [Stage(assemble.ShardStage, (self.work, self.out))])
        shards = {item["shard"]: {"count": item["count"], "sha256": item["sha256"]} for item in written}
        return dict(sorted(shards.items()))

    def funnel(self, tables: dict[str, Any], reasons: Counter[str], candidates: int, chosen: assemble.Chosen, looked_at: int) -> list[dict[str, Any]]:
        """Masks in, and where each went: step, reason, count. Raises AssertionError when one is missing."""
        rows, bad = tables["masks"].get("rows", 0), tables["masks"].get("bad_rows", 0)
        steps = [("annotations", "bad_row", bad), *(("annotations", reason, n) for reason, n in reasons.items()),
                 *(("pictures and captions", reason, n) for reason, n in sorted(chosen.reasons.items()))]
        if looked_at < candidates:
            steps.append(("limit", "not_looked_at", candidates - looked_at))
        assert rows == len(chosen) + sum(n for *_, n in steps), "a mask was lost: in is not out plus counted"
        return [{"step": "in", "reason": "masks", "count": rows}, *({"step": s, "reason": r, "count": n} for s, r, n in steps),
                {"step": "out", "reason": "triplets", "count": len(chosen)}]

    def finish(self, chosen: assemble.Chosen, shards: dict[str, Any], tables: dict[str, Any], funnel: list[dict[str, Any]]) -> dict[str, Any]:
        split = self.config.split
        for path in self.out.glob(f"{split}-*.tar"):
            if path.name not in shards:  # of a configuration in between
                path.unlink()
        assemble.write_index(self.work, self.out, split, list(shards))
        part = {
            "requested": len(chosen), "samples_per_shard": self.config.shards.samples_per_shard, "seed": self.config.seed,
            "config": self.decides, "count": len(chosen), "shards": shards, "index": f"{split}-index.parquet", "funnel": funnel,
            "tables": tables, "notes": dict(sorted(chosen.notes.items())), "versions": versions(),
        }
        write_json(self.out / sharding.MANIFEST, sharding.read_manifest(self.out) | {split: part})
        if not self.config.run.keep_work:
            removing = self.work.with_name(f".{self.work.name}.removing")  # half removed, it would be gone on with
            self.work.rename(removing)
            shutil.rmtree(removing)
        print(f"{split}: {len(chosen)} triplets in {len(shards)} shards under {self.config.out}")
        return part

    def _remove_others(self) -> None:
        """Shards of another configuration go, with their part of the manifest, before the first new one comes."""
        manifest, mine = sharding.read_manifest(self.out), self.work / "index"
        if manifest.pop(self.config.split, None) is not None:
            write_json(self.out / sharding.MANIFEST, manifest)
        marker, wanted = mine / "config.json", json.dumps(self.decides)
        if not (marker.exists() and marker.read_text() == wanted):
            shutil.rmtree(mine, ignore_errors=True)
            for path in [*self.out.glob(f"{self.config.split}-*.tar"), self.out / f"{self.config.split}-index.parquet"]:
                path.unlink(missing_ok=True)
            write_beside(marker, lambda beside: beside.write_text(wanted))


def with_absolute_paths(config: BuildConfig) -> BuildConfig:
    """What workers are told: on other nodes of a cluster they run in another folder."""
    def absolute(path: str) -> str:
        return path if is_url(path) else str(Path(path).absolute())

    def of_words(name: str) -> str:  # our own lists have names without a slash
        return absolute(name) if "/" in name else name

    sources, captions = config.sources, config.captions
    sources = replace(sources, annotations=absolute(sources.annotations), pictures=absolute(sources.pictures),
                      captions=sources.captions and absolute(sources.captions))
    local = {name: str(path.absolute()) for name, path in _files_of(captions).items()}
    captions = replace(captions, word_lists=list(map(of_words, captions.word_lists)),
                       people_words=captions.people_words and of_words(captions.people_words), init_args=captions.init_args | local)
    return replace(config, sources=sources, captions=captions)


def deciding(config: BuildConfig) -> dict[str, Any]:
    """The part of a configuration that decides what is written, as JSON values; word lists and captions file by content, a captioner's own files too."""
    decides = {key: value for key, value in asdict(config).items() if key not in ("out", "run")}
    decides["on_unreachable"] = decides["sources"].pop("fetch")["on_unreachable"]
    del decides["sources"]["download_mask_zips"]
    rules = CaptionRules.of(config.captions)
    decides["format"], decides["words"] = FORMAT, _digest([sorted(rules.removed), sorted(rules.people)])
    captions = config.sources.captions
    if captions is not None and Path(captions).is_file():
        decides["captions_sha256"] = sharding.sha256(Path(captions))
    elif captions is None and (files := _files_of(config.captions)):
        decides["captioner_files"] = {name: content_digest(path) for name, path in files.items()}
    return json.loads(json.dumps(decides))


def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _files_of(config: CaptionConfig) -> dict[str, Path]:
    """Options of the captioner that name a file or a folder here."""
    return {name: Path(value) for name, value in config.init_args.items() if isinstance(value, str) and value and os.path.exists(value)}


def _require_same_or_more(out: Path, split: str, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """ValueError where the finished split would be replaced by anything but the same with a larger limit, or another answer to unreachable servers."""
    before, now = flat(there), flat(wanted)
    others = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)} - {"on_unreachable"}
    if there.get("limit") is not None and (wanted["limit"] is None or wanted["limit"] > there["limit"]):
        others -= {"limit"}
    if others:
        what = "by an older version" if "format" in others else f"of other options ({', '.join(sorted(others))})"
        raise ValueError(f"{out} holds the finished split {split} {what}: write elsewhere with --out, or replace it "
                         "with --run.overwrite true")


def _is_whole(out: Path, part: dict[str, Any]) -> bool:
    paths = {out / name: entry["sha256"] for name, entry in part["shards"].items()}
    return (out / part["index"]).is_file() and all(path.is_file() and sharding.sha256(path) == digest for path, digest in paths.items())


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
