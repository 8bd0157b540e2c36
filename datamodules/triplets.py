"""The one datamodule of image / caption / mask triplets that both training stages share.

Training reads shards for ever: pass after pass, each pass with the shards in a new order, dealt out to ranks and their
workers, so that every rank gets the same fixed number of steps an epoch however uneven the shards are. Where every reader
stands is kept in checkpoints. Validation reads each sample once, in the same batches on every run.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from datamodules.caches.stamp import read_stamps
from datamodules.samples import BadSamples
from datamodules.shards import expand_shards, require_a_shard_each
from datamodules.streams import Batch, Position, TrainStream, TripletConfig, ValStream
from datamodules.worker_signals import ignore_requests_of_others
from moma_lightning.training.sharding import over_ranks

__all__ = ["TripletConfig", "TripletDataModule"]


@dataclass
class Progress:
    """Where this rank's workers stand, how many batches of the epoch were handed over, and where a resumed run is to go on in it."""

    positions: dict[int, Position] = field(default_factory=dict)
    given: int = 0
    resume_at: int = 0


class TripletDataModule(LightningDataModule):
    """Batches of `moma_lightning.batch.TripletBatch`, or of `CachedBatch` where the shards are a cache's (`datamodules/caches`).

    The state in a checkpoint holds where each reader of each rank stood when its last batch was handed over, so a resumed run
    goes on with the next sample, in the same batches and the same order as an undisturbed one. After a change of workers,
    ranks, shards, seed or shuffling, reading starts with the next pass.

    Raises ValueError in `setup` for patterns without shards, for other shards on one rank than on another, fewer training shards than
    ranks x workers, several ranks without `val_batches`, a `trainer.limit_train_batches` below an epoch, and cached shards that are stale
    or do not belong (`caches.stamp.read_stamps`).
    """

    def __init__(self, config: TripletConfig):
        super().__init__()
        self.config = config
        self.progress = Progress()
        self.train_shards: list[str] = []
        self.made_by: dict[str, dict[str, str]] = {}  # of each cached shard; the stage holds it against its own models

    @property
    def rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    @property
    def bad_samples(self) -> BadSamples:
        root = self.trainer.default_root_dir if self.trainer else "."
        return BadSamples(Path(self.config.bad_samples or Path(root) / "bad_samples.log"), self.config.on_error)

    def setup(self, stage: str | None = None) -> None:
        _, world_size = self.rank_and_world_size
        self.val_shards = expand_shards(self.config.val)
        if world_size > 1 and self.config.val_batches is None:
            raise ValueError(f"{world_size} ranks need data.config.val_batches, so that all validate equally long")
        if stage in (None, "fit"):
            self.train_shards = expand_shards(self.config.train)
            require_a_shard_each(len(self.train_shards), world_size, self.config.num_workers)
            self._require_whole_epochs()
        shards = self.val_shards + (self.train_shards if stage in (None, "fit") else [])
        require_the_same_shards(over_ranks([Path(shard).name for shard in shards]))
        self.made_by = {shard: stamp.made_by for shard, stamp in read_stamps(shards, self.config.image_size, self.config.flip).items()}

    def _require_whole_epochs(self) -> None:
        """Workers read ahead: what they hold when an epoch is cut off would be lost."""
        if self.trainer and self.trainer.overfit_batches:
            raise ValueError("trainer.overfit_batches: every epoch has other batches here; to overfit, train on a shard of a few samples")
        limit = getattr(self.trainer, "limit_train_batches", 1.0)
        cut = limit < 1.0 if isinstance(limit, float) else isinstance(limit, int) and limit < self.config.steps_per_epoch
        if cut and not self.trainer.fast_dev_run:
            steps = self.config.steps_per_epoch
            raise ValueError(f"trainer.limit_train_batches {limit} ends an epoch within its {steps} steps: set data.config.steps_per_epoch instead")

    def train_dataloader(self) -> "TrainLoader":
        def build(first: int) -> DataLoader:
            stream = TrainStream(self.config, self.train_shards, self.bad_samples, *self.rank_and_world_size, self.progress.positions, first)
            return _loader(stream, self.config, persistent=first == 0)

        return TrainLoader(build, self.progress, self.config.steps_per_epoch)

    def val_dataloader(self) -> DataLoader:
        return _loader(ValStream(self.config, self.val_shards, self.bad_samples, *self.rank_and_world_size), self.config)

    def teardown(self, stage: str | None = None) -> None:
        counts = self.bad_samples.counts()
        if counts:
            rank_zero_info(f"{counts.total()} bad samples or shards skipped by this run and those before it, {dict(counts)}: see {self.bad_samples.path}")

    def state_dict(self) -> dict[str, Any]:
        """Readers are numbered over all ranks; every rank must call this."""
        first = self.rank_and_world_size[0] * max(1, self.config.num_workers)
        ranks = over_ranks({first + worker: position for worker, position in self.progress.positions.items()})
        return {
            "readers": self._readers(),
            "order": self._order(),
            "sizes": self._sizes(),
            "positions": {reader: position for positions in ranks for reader, position in positions.items()},
            "given": self.progress.given % self.config.steps_per_epoch,
            "samples_a_step": self._samples_a_step(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        workers = max(1, self.config.num_workers)
        first = self.rank_and_world_size[0] * workers
        positions = {reader: (number, drawn) for reader, (number, drawn) in state_dict["positions"].items()}
        self.progress = Progress({reader - first: at for reader, at in positions.items() if first <= reader < first + workers})
        self.progress.given = self.progress.resume_at = state_dict.get("given", 0)
        if self.train_shards and positions and (state_dict["readers"] != self._readers() or state_dict.get("order", self._order()) != self._order()):
            next_pass = max(number for number, _ in positions.values()) + 1
            self.progress.positions = dict.fromkeys(range(workers), (next_pass, 0))
            rank_zero_warn("the number of ranks or workers, the shards, the seed or the shuffling are not the checkpoint's: reading goes on with the next pass")
        elif self.train_shards and positions and state_dict.get("sizes", self._sizes()) != self._sizes():
            rank_zero_warn("shards of the same names are of other sizes than the checkpoint's: reading goes on at the same places of what is there now")
        now = self._samples_a_step()
        before = state_dict.get("samples_a_step")
        if self.train_shards and None not in (before, now) and before != now:
            rank_zero_warn(f"a step has {now} samples from here on, the checkpoint's had {before} (ranks x batch_size x trainer.accumulate_grad_batches): "
                           "set these so that it has as many, or optimizer.lr and trainer.max_steps by your own rule")

    def _order(self) -> str:
        """Digest of what decides which sample comes when, the number of readers apart."""
        told = [[Path(shard).name for shard in self.train_shards], self.config.seed, self.config.shuffle_buffer]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def _sizes(self) -> str:
        """Digest of the local shards' sizes: others of the same names may be a cache of the same samples, or other samples."""
        sizes = [os.path.getsize(shard) if os.path.isfile(shard) else None for shard in self.train_shards]
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]

    def _samples_a_step(self) -> int | None:
        """None where a callback decides it anew in each epoch."""
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in getattr(self.trainer, "callbacks", [])):
            return None
        return self.rank_and_world_size[1] * self.config.batch_size * getattr(self.trainer, "accumulate_grad_batches", 1)

    def _readers(self) -> list[int]:
        return [self.rank_and_world_size[1], max(1, self.config.num_workers)]


class TrainLoader:
    """Gives an epoch's batches and notes in `progress` what was handed over; the first epoch of a resumed run is what was left of it.

    build: makes a loader that begins with the given batch of an epoch, its readers where `progress` says.
    waited: seconds that batches were waited for, since this loader is there (`moma_lightning.training.pace` logs them).
    """

    def __init__(self, build: Callable[[int], DataLoader], progress: Progress, steps: int):
        self.build, self.progress, self.steps = build, progress, steps
        self.whole_epochs: DataLoader | None = None
        self.waited = 0.0

    def __len__(self) -> int:
        return self.steps

    # By these two Lightning sees that a run can be resumed within an epoch. The datamodule keeps the state: it knows the ranks.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def __iter__(self) -> Iterator[Batch]:
        begun = time.perf_counter()
        first, self.progress.resume_at = self.progress.resume_at, 0
        if first == 0 and self.whole_epochs is None:
            self.whole_epochs = self.build(0)
        loader = self.build(first) if first else self.whole_epochs
        assert loader is not None
        self.progress.given = first
        for batch, worker, position in loader:
            self.progress.positions[worker] = position
            self.progress.given += 1
            self.waited += time.perf_counter() - begun
            yield batch
            begun = time.perf_counter()


def require_the_same_shards(names: list[list[str]]) -> None:
    """names: of each rank. Raises ValueError where ranks see other files: samples would be left out and seen twice."""
    first, *others = map(Counter, names)
    for rank, own in enumerate(others, 1):
        if lacking := sorted((first - own) + (own - first)):
            raise ValueError(f"rank {rank} sees {own.total()} shards and rank 0 {first.total()}: {', '.join(lacking[:5])} are on one of them only. "
                             "Put the same shards on every node")


def _loader(stream: IterableDataset, config: TripletConfig, persistent: bool = True) -> DataLoader:
    # Workers live on between epochs: a training worker keeps its place in the shards.
    workers = config.num_workers
    return DataLoader(stream, batch_size=None, num_workers=workers, persistent_workers=persistent and workers > 0, collate_fn=_as_it_is,
                      worker_init_fn=ignore_requests_of_others)


def _as_it_is(batch: Any) -> Any:
    return batch


