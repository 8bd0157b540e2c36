"""Run a stage's frozen models over shards once: a cached shard beside its stamp for each, the shards shared out among processes."""

import logging
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import webdataset as wds
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.caches import samples as cached
from datamodules.caches.stamp import LIST, CacheStamp, source_state
from datamodules.samples import BadSampleError, BadSamples, Triplet, decode, read_shards
from datamodules.shards import expand_shards
from datamodules.streams import TripletConfig, batched, of_pictures
from moma_lightning.digests import same_identity
from moma_lightning.files import write_beside, write_json
from moma_lightning.modules.base import TrainedPartModule
from moma_lightning.training.guards import Preempted, is_anothers_child, only_note_sigterm

logger = logging.getLogger(__name__)


@dataclass
class CacheConfig:
    """out: folder of the cached shards, which keep their sources' names; None: `cache` in the stage's `trainer.default_root_dir`.

    dtype: of the stored features. mirrored: keep every sample's mirrored view as well, which training with `flip` needs.
    """

    out: str | None = None
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    mirrored: bool = True


class CacheMaker(LightningModule):
    """Makes this process's share of the cached shards that are missing or stale, under `Trainer.predict`."""

    def __init__(self, stage: TrainedPartModule, data: TripletConfig, config: CacheConfig, out: Path):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.stage, self.data, self.config, self.out = stage.eval(), data, config, out
        self.bad = BadSamples(Path(data.bad_samples or out / "bad_samples.log"), data.on_error)

    def setup(self, stage: str) -> None:
        self.made_by = self.stage.cache_identity()
        if self.trainer.precision == "bf16-mixed":
            self.stage.hold_frozen()  # as training does

    def predict_dataloader(self) -> DataLoader:
        """Numbers of the shards; every `world_size`-th is this process's."""
        self.shards = sources(self.data)
        if any(path.parent.resolve() == self.out.resolve() for path in self.shards):
            raise ValueError(f"cache.out {self.out} is the folder of the shards themselves, which the cached ones would overwrite: write elsewhere")
        if self.trainer.global_rank == 0:
            self.announce({path.name for path in self.shards})
        own = range(self.trainer.global_rank, len(self.shards), self.trainer.world_size)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*|Total length of `DataLoader`.*")
        return DataLoader(own, batch_size=None)

    def announce(self, names: set[str]) -> None:
        """List what the cache is to hold, and remove what an earlier one left, which a pattern would find too."""
        write_json(self.out / LIST, sorted(names))
        for shard in self.out.glob("*.tar"):
            if shard.name not in names and CacheStamp.path(shard).is_file():
                CacheStamp.path(shard).unlink()
                shard.unlink()

    def on_predict_start(self) -> None:
        only_note_sigterm(self.trainer)

    def predict_step(self, number: int, batch_idx: int) -> int:
        """Make one shard, unless it is there already. Returns its number of samples."""
        if self.trainer.received_sigterm:
            logger.info("told to end: the shards that are made are kept, and the same command goes on from there")
            raise Preempted(0 if is_anothers_child(self.trainer) else 128 + signal.SIGTERM)
        source = self.shards[number]
        shard = self.out / source.name
        there = CacheStamp.read(shard)
        wanted = CacheStamp(made_by=self.made_by, image_size=self.data.image_size, views=1 + self.config.mirrored, dtype=self.config.dtype,
                            **source_state(source, there))
        if there is not None and shard.is_file():
            same = replace(wanted, samples=there.samples, left_out=there.left_out, size=shard.stat().st_size, made_by=there.made_by)
            if there == same and same_identity(there.made_by, self.made_by):
                if there.source_mtime_ns != same.source_mtime_ns:
                    same.write(shard)  # so that training need not read a source whose time alone is another
                return same.samples
        stamp = self.make(source, shard, wanted)
        logger.info("%s: %d samples, %d left out (%d of %d shards)", shard, stamp.samples, stamp.left_out, number + 1, len(self.shards))
        return stamp.samples

    def make(self, source: Path, shard: Path, wanted: CacheStamp) -> CacheStamp:
        """Write the shard and then, as the sign that it is whole, its stamp."""
        CacheStamp.path(shard).unlink(missing_ok=True)
        counts = {"samples": 0, "left_out": 0}
        write_beside(shard, lambda path: self.write(source, path, counts))
        stamp = replace(wanted, samples=counts["samples"], left_out=counts["left_out"], size=shard.stat().st_size)
        stamp.write(shard)
        return stamp

    def write(self, source: Path, path: Path, counts: dict[str, int]) -> None:
        with path.open("wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as tar:
            for group in batched(self.triplets(source, counts), self.data.batch_size):
                features = self.features(group)
                for i, triplet in enumerate(group):
                    tar.write(cached.encode(triplet, {name: feature[i] for name, feature in features.items()}))
                    counts["samples"] += 1

    def triplets(self, source: Path, counts: dict[str, int]) -> Iterator[Triplet]:
        for sample in read_shards([str(source)], self.bad):
            try:
                yield decode(sample, self.data.image_size)
            except BadSampleError as error:
                self.bad.report(sample["__url__"], sample["__key__"], str(error))
                counts["left_out"] += 1

    @torch.no_grad()
    def features(self, triplets: list[Triplet]) -> dict[str, Tensor]:
        """[batch, views, ...] each."""
        batch = self.transfer_batch_to_device(of_pictures(triplets), self.device, 0)
        views = [batch, replace(batch, pixel_values=batch.pixel_values.flip(-1), subject_mask=batch.subject_mask.flip(-1))]
        made = [self.stage.features(view) for view in views[: 1 + self.config.mirrored]]
        return {name: torch.stack([part[name] for part in made], 1).to("cpu", getattr(torch, self.config.dtype)) for name in made[0]}


def sources(data: TripletConfig) -> list[Path]:
    """The local shards of pictures that training and validation read. Raises ValueError for URLs and for two of the same name."""
    paths = [Path(shard) for shard in expand_shards(data.train) + expand_shards(data.val)]
    if caches := [path for path in paths if CacheStamp.read(path)]:
        raise ValueError(f"{caches[0]} is a cache itself: name the shards of pictures")
    if remote := [path for path in paths if not path.is_file()]:
        raise ValueError(f"{remote[0]}: only local shards can be cached")
    if len({path.name for path in paths}) < len(paths):
        raise ValueError("training and validation shards of the same name would overwrite each other in the cache: rename one of them")
    return [path.absolute() for path in paths]


def finished(data: TripletConfig, out: Path) -> dict[str, Any]:
    """What the cache holds: shards, samples, left out, megabytes."""
    stamps = [stamp for path in sources(data) if (stamp := CacheStamp.read(out / path.name)) is not None]
    return {"shards": len(stamps), "samples": sum(s.samples for s in stamps), "left_out": sum(s.left_out for s in stamps),
            "megabytes": round(sum(s.size for s in stamps) / 1e6, 1)}
