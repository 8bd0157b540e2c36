"""The one datamodule of image / caption / mask triplets that both training stages share.

Training reads shards for ever: pass after pass, each pass with the shards in a new order, dealt out to ranks and their
workers, so that every rank gets the same fixed number of steps an epoch however uneven the shards are. Where every reader
stands is kept in checkpoints. Validation reads each sample once, in the same batches on every run.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import webdataset as wds
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.samples import BadSampleError, BadSamples, OnError, Triplet, decode, read_shards
from datamodules.shards import expand_shards, require_a_shard_each
from moma_lightning.batch import TripletBatch
from moma_lightning.training.sharding import over_ranks

Position = tuple[int, int]  # number of the pass, and how many samples of it this reader has drawn


@dataclass
class TripletConfig:
    """Options of `TripletDataModule`.

    train, val: shards, as a path, a glob, a `{00000..00011}` range or a list of these; URLs that webdataset can open are taken
        as they are.
    image_size: side of the square pictures, in pixels.
    batch_size: samples a rank and step.
    num_workers: loading processes a rank; 0 loads in the training process.
    shuffle_buffer: samples (undecoded) that each reader shuffles among, on top of the order of shards.
    steps_per_epoch: training batches a rank and epoch.
    val_batches: validation batches a rank; None is all there are. More than one rank needs the number: every rank then gives
        exactly as many, from its beginning again when its part is short.
    flip: flip picture and mask together, half of the time, in training.
    on_error: "skip" names bad samples in the log and goes on; "raise" stops at the first.
    bad_samples: the log; None is `bad_samples.log` in the trainer's root folder.
    """

    train: str | list[str]
    val: str | list[str]
    image_size: int = 64
    batch_size: int = 16
    num_workers: int = 0
    shuffle_buffer: int = 1000
    steps_per_epoch: int = 500
    val_batches: int | None = None
    flip: bool = True
    on_error: OnError = "skip"
    bad_samples: str | None = None
    seed: int = 0


@dataclass
class Progress:
    """Where this rank's workers stand, how many batches of the epoch were handed over, and where a resumed run is to go on in it."""

    positions: dict[int, Position] = field(default_factory=dict)
    given: int = 0
    resume_at: int = 0


class TripletDataModule(LightningDataModule):
    """Batches of `moma_lightning.batch.TripletBatch`.

    The state in a checkpoint holds where each reader of each rank stood when its last batch was handed over, so a resumed run
    goes on with the next sample, in the same batches and the same order as an undisturbed one. After a change of workers or
    ranks, reading starts with the next pass.

    Raises ValueError in `setup` for patterns without shards, fewer training shards than ranks x workers, and several ranks
    without `val_batches`.
    """

    def __init__(self, config: TripletConfig):
        super().__init__()
        self.config = config
        self.progress = Progress()

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
            rank_zero_info(f"{counts.total()} bad samples skipped, {dict(counts)}: see {self.bad_samples.path}")

    def state_dict(self) -> dict[str, Any]:
        """Readers are numbered over all ranks; every rank must call this."""
        first = self.rank_and_world_size[0] * max(1, self.config.num_workers)
        ranks = over_ranks({first + worker: position for worker, position in self.progress.positions.items()})
        return {
            "readers": self._readers(),
            "positions": {reader: position for positions in ranks for reader, position in positions.items()},
            "given": self.progress.given % self.config.steps_per_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        workers = max(1, self.config.num_workers)
        first = self.rank_and_world_size[0] * workers
        positions = {reader: (number, drawn) for reader, (number, drawn) in state_dict["positions"].items()}
        self.progress = Progress({reader - first: at for reader, at in positions.items() if first <= reader < first + workers})
        self.progress.given = self.progress.resume_at = state_dict.get("given", 0)
        if state_dict["readers"] != self._readers() and positions:
            next_pass = max(number for number, _ in positions.values()) + 1
            self.progress.positions = dict.fromkeys(range(workers), (next_pass, 0))

    def _readers(self) -> list[int]:
        return [self.rank_and_world_size[1], max(1, self.config.num_workers)]


class TrainStream(IterableDataset):
    """One reader's endless stream of (batch, worker, position after it); each iteration gives this worker's share of an epoch.

    The stream goes on from one epoch to the next: a new epoch never starts again at the beginning of the shards.

    first: the epoch's first batch, for the rest of an epoch. Batch k of an epoch is always worker k mod workers'; a loader asks its
    own workers in their order, so that they take other places then.
    """

    def __init__(
        self, config: TripletConfig, shards: list[str], bad: BadSamples, rank: int, world_size: int, start: dict[int, Position], first: int = 0
    ):
        self.config, self.shards, self.bad = config, shards, bad
        self.rank, self.world_size, self.start, self.first = rank, world_size, dict(start), first
        self._stream: Iterator[tuple[TripletBatch, int, Position]] | None = None

    def __iter__(self) -> Iterator[tuple[TripletBatch, int, Position]]:
        worker, workers = _worker()
        if self._stream is None:
            self._stream = self._batches((self.first + worker) % workers, workers)
        share = len(range(self.first + worker, self.config.steps_per_epoch, workers))
        return itertools.islice(self._stream, share)

    def _batches(self, worker: int, workers: int) -> Iterator[tuple[TripletBatch, int, Position]]:
        samples = self._samples(worker, workers)
        while True:
            drawn = list(itertools.islice(samples, self.config.batch_size))
            yield collate([sample for sample, _ in drawn]), worker, drawn[-1][1]

    def _samples(self, worker: int, workers: int) -> Iterator[tuple[Triplet, Position]]:
        reader = self.rank * workers + worker
        first, skip = self.start.get(worker, (0, 0))
        for number in itertools.count(first):
            found = skip > 0
            for index, sample in enumerate(self._one_pass(number, reader, self.world_size * workers)):
                if index < skip:
                    continue
                rng = np.random.default_rng([self.config.seed, number, reader, index])
                triplet = _decode_or_report(sample, self.config, self.bad, rng)
                if triplet is not None:
                    found = True
                    yield triplet, (number, index + 1)
            if not found:
                _require_a_good_sample(self.shards, self.config, self.bad)
            skip = 0

    def _one_pass(self, number: int, reader: int, readers: int) -> Iterator[dict[str, Any]]:
        """This reader's undecoded samples of a pass, shuffled; a function of the seed, the pass and the reader alone."""
        order = np.random.default_rng([self.config.seed, number]).permutation(len(self.shards))
        samples = read_shards([self.shards[i] for i in order[reader::readers]], self.bad)
        rng = Random(f"{self.config.seed} {number} {reader}")
        return wds.shuffle(self.config.shuffle_buffer, initial=self.config.shuffle_buffer, rng=rng)(samples)


class TrainLoader:
    """Gives an epoch's batches and notes in `progress` what was handed over; the first epoch of a resumed run is what was left of it.

    build: makes a loader that begins with the given batch of an epoch, its readers where `progress` says.
    """

    def __init__(self, build: Callable[[int], DataLoader], progress: Progress, steps: int):
        self.build, self.progress, self.steps = build, progress, steps
        self.whole_epochs: DataLoader | None = None

    def __len__(self) -> int:
        return self.steps

    # By these two Lightning sees that a run can be resumed within an epoch. The datamodule keeps the state: it knows the ranks.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def __iter__(self) -> Iterator[TripletBatch]:
        first, self.progress.resume_at = self.progress.resume_at, 0
        if first == 0 and self.whole_epochs is None:
            self.whole_epochs = self.build(0)
        loader = self.build(first) if first else self.whole_epochs
        assert loader is not None
        self.progress.given = first
        for batch, worker, position in loader:
            self.progress.positions[worker] = position
            self.progress.given += 1
            yield batch


class ValStream(IterableDataset):
    """Every sample once, in batches cut from the shards' order: whatever the number of workers, batches are the same.

    Batch k goes to rank k mod world size. A bad sample leaves its batch smaller.
    """

    def __init__(self, config: TripletConfig, shards: list[str], bad: BadSamples, rank: int, world_size: int):
        self.config, self.shards, self.bad, self.rank, self.world_size = config, shards, bad, rank, world_size

    def __iter__(self) -> Iterator[TripletBatch]:
        worker, workers = _worker()
        groups = itertools.islice(self._groups(), self.config.val_batches)
        empty = True
        for group in itertools.islice(groups, worker, None, workers):
            drawn = [_decode_or_report(sample, self.config, self.bad) for sample in group]
            triplets = [triplet for triplet in drawn if triplet is not None]
            if triplets:
                empty = False
                yield collate(triplets)
            elif self.world_size > 1:
                raise BadSampleError(f"a validation batch has no good sample, ranks would go out of step: see {self.bad.path}")
        if empty and worker == 0:
            _require_a_good_sample(self.shards, self.config, self.bad)

    def _groups(self) -> Iterator[list[dict[str, Any]]]:
        """This rank's undecoded batches; over and over with several ranks, where the number of batches is fixed."""
        while True:
            groups = _batched(read_shards(self.shards, self.bad), self.config.batch_size)
            own = itertools.islice(groups, self.rank, None, self.world_size)
            if self.world_size == 1:
                yield from own
                return
            first = next(own, None)
            if first is None:
                raise ValueError(f"validation has fewer batches of {self.config.batch_size} than the {self.world_size} ranks")
            yield first
            yield from own


def collate(triplets: list[Triplet]) -> TripletBatch:
    return TripletBatch(
        pixel_values=torch.stack([t.pixel_values for t in triplets]),
        subject_mask=torch.stack([t.subject_mask for t in triplets]),
        caption=[t.caption for t in triplets],
        label=[t.label for t in triplets],
        key=[t.key for t in triplets],
        full_caption=[t.full_caption for t in triplets],
    )


def _loader(stream: IterableDataset, config: TripletConfig, persistent: bool = True) -> DataLoader:
    # Workers live on between epochs: a training worker keeps its place in the shards.
    workers = config.num_workers
    return DataLoader(stream, batch_size=None, num_workers=workers, persistent_workers=persistent and workers > 0, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


def _batched(samples: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while group := list(itertools.islice(samples, size)):
        yield group


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _decode_or_report(
    sample: dict[str, Any], config: TripletConfig, bad: BadSamples, rng: np.random.Generator | None = None
) -> Triplet | None:
    try:
        return decode(sample, config.image_size, rng, config.flip)
    except BadSampleError as error:
        bad.report(sample["__url__"], sample["__key__"], str(error))
        return None


def _require_a_good_sample(shards: list[str], config: TripletConfig, bad: BadSamples) -> None:
    """A part without a good sample is odd but harmless while others have some; without any, the stream would never end."""
    decoded = map(functools.partial(_decode_or_report, config=config, bad=bad), read_shards(shards, bad))
    if not any(triplet is not None for triplet in decoded):
        raise BadSampleError(f"none of {len(shards)} shards ({shards[0]}, ...) has a usable sample: see {bad.path}")
