"""Readers of shards: an endless stream for training, every sample once for validation.

A reader is one loading process of one rank. What it reads is a function of the seed, the pass and its own number alone.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, TypeVar

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.caches import samples as cached
from datamodules.samples import BadSampleError, BadSamples, OnError, Triplet, decode, read_shards
from moma_lightning.batch import CachedBatch, TripletBatch

Position = tuple[int, int]  # number of the pass, and how many samples of it this reader has drawn
Batch = TripletBatch | CachedBatch
Item = TypeVar("Item")


@dataclass
class TripletConfig:
    """Options of `TripletDataModule`.

    train, val: shards, as a path, a glob, a `{00000..00011}` range or a list of these; URLs that webdataset can open are taken
        as they are. Both may be a cache's.
    image_size: side of the square pictures, in pixels.
    batch_size: samples a rank and step.
    num_workers: loading processes a rank; 0 loads in the training process.
    shuffle_buffer: samples (undecoded) that each reader shuffles among, on top of the order of shards.
    steps_per_epoch: training batches a rank and epoch.
    val_batches: validation batches a rank; None is all there are. More than one rank needs the number: every rank then gives
        exactly as many, from its beginning again when its part is short, and another rank's where there are fewer batches than ranks.
        What is given again counts in no score (`TripletBatch.repeated`).
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

    def __post_init__(self):
        for name, least in {"image_size": 1, "batch_size": 1, "steps_per_epoch": 1, "num_workers": 0, "shuffle_buffer": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.config.{name} is {getattr(self, name)}: it has to be {least} or more")


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
        self._stream: Iterator[tuple[Batch, int, Position]] | None = None

    def __iter__(self) -> Iterator[tuple[Batch, int, Position]]:
        worker, workers = _worker()
        if self._stream is None:
            self._stream = self._batches((self.first + worker) % workers, workers)
        share = len(range(self.first + worker, self.config.steps_per_epoch, workers))
        return itertools.islice(self._stream, share)

    def _batches(self, worker: int, workers: int) -> Iterator[tuple[Batch, int, Position]]:
        samples = self._samples(worker, workers)
        while True:
            drawn = list(itertools.islice(samples, self.config.batch_size))
            yield collate([sample for sample, _ in drawn]), worker, drawn[-1][1]

    def _samples(self, worker: int, workers: int) -> Iterator[tuple[Any, Position]]:
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


class ValStream(IterableDataset):
    """Every sample once, in batches cut from the shards' order: whatever the number of workers, batches are the same.

    Batch k goes to rank k mod world size. A bad sample leaves its batch smaller. A batch without a good one is left out; on several ranks,
    which would go out of step, the split's first is given again in its place.
    """

    def __init__(self, config: TripletConfig, shards: list[str], bad: BadSamples, rank: int, world_size: int):
        self.config, self.shards, self.bad, self.rank, self.world_size = config, shards, bad, rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _worker()
        groups = itertools.islice(self._groups(), self.config.val_batches)
        empty = True
        for group, repeated in itertools.islice(groups, worker, None, workers):
            if triplets := self._good(group):
                empty = False
                yield replace(collate(triplets), repeated=repeated)
            elif self.world_size > 1:
                yield replace(self._first(), repeated=True)
        if empty and worker == 0:
            _require_a_good_sample(self.shards, self.config, self.bad)

    def _good(self, group: list[dict[str, Any]]) -> list[Triplet | cached.CachedTriplet]:
        decoded = [_decode_or_report(sample, self.config, self.bad) for sample in group]
        return [triplet for triplet in decoded if triplet is not None]

    def _first(self) -> Batch:
        """The split's first batch that has a good sample."""
        _require_a_good_sample(self.shards, self.config, self.bad)
        return next(collate(good) for group in batched(read_shards(self.shards, self.bad), self.config.batch_size) if (good := self._good(group)))

    def _groups(self) -> Iterator[tuple[list[dict[str, Any]], bool]]:
        """This rank's undecoded batches, and whether they were given before: over and over with several ranks, where the number of batches is fixed."""
        rank, repeated = self.rank, False
        while True:
            count = 0
            for group in batched(read_shards(self.shards, self.bad), self.config.batch_size):
                if count % self.world_size == rank:
                    yield group, repeated
                count += 1
            if self.world_size == 1 or not count:
                return
            repeated = True
            rank %= count  # fewer batches than ranks: this rank gives another's again


def collate(triplets: Sequence[Triplet | cached.CachedTriplet]) -> Batch:
    """Samples of one kind as a batch."""
    if views := [triplet for triplet in triplets if isinstance(triplet, cached.CachedTriplet)]:
        return cached.collate(views)
    return of_pictures([triplet for triplet in triplets if isinstance(triplet, Triplet)])


def of_pictures(triplets: list[Triplet]) -> TripletBatch:
    return TripletBatch(
        pixel_values=torch.stack([t.pixel_values for t in triplets]),
        subject_mask=torch.stack([t.subject_mask for t in triplets]),
        caption=[t.caption for t in triplets],
        label=[t.label for t in triplets],
        key=[t.key for t in triplets],
        full_caption=[t.full_caption for t in triplets],
    )


def batched(samples: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while group := list(itertools.islice(samples, size)):
        yield group


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _decode_or_report(
    sample: dict[str, Any], config: TripletConfig, bad: BadSamples, rng: np.random.Generator | None = None
) -> Triplet | cached.CachedTriplet | None:
    try:
        if cached.FEATURES in sample:
            return cached.decode(sample, rng, config.flip)
        return decode(sample, config.image_size, rng, config.flip)
    except BadSampleError as error:
        bad.report(sample["__url__"], sample["__key__"], str(error))
        return None


def _require_a_good_sample(shards: list[str], config: TripletConfig, bad: BadSamples) -> None:
    """A part without a good sample is odd but harmless while others have some; without any, the stream would never end."""
    decoded = map(functools.partial(_decode_or_report, config=config, bad=bad), read_shards(shards, bad))
    if not any(triplet is not None for triplet in decoded):
        why = f"see {bad.path}" if bad.path.exists() else "they are empty"
        raise BadSampleError(f"none of {len(shards)} shards ({shards[0]}, ...) has a usable sample: {why}")
