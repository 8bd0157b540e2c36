"""The loader against bare webdataset with the same decoding, and decoding at reduced scale against decoding whole."""

import functools
import io
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from datamodules.pictures import open_picture
from datamodules.samples import decode
from datamodules.shards import ShardSample, write_shard
from datamodules.squares import cut, square_box
from datamodules.streams import collate
from datamodules.triplets import TripletConfig, TripletDataModule
from experiments.benchmarks.timing import Case, Run

SAMPLES, BATCH, SIDE, SOURCE = 64, 16, 256, (1024, 768)


def photograph(seed: int, size: tuple[int, int] = SOURCE) -> Image.Image:
    """Soft shapes under fine grain; of 1024 x 768 pixels a JPEG keeps about 200 kB."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(soft) + rng.normal(0, 4, (size[1], size[0], 3))).clip(0, 255).astype(np.uint8))


@functools.cache
def jpeg(seed: int, size: tuple[int, int] = SOURCE) -> bytes:
    file = io.BytesIO()
    photograph(seed, size).save(file, "JPEG", quality=90)
    return file.getvalue()


def samples(count: int, size: tuple[int, int], first: int = 0) -> list[ShardSample]:
    """Numbered from `first`; the subject is a box in the middle."""
    mask = Image.new("1", size, 0)  # as in shards built from OpenImages
    mask.paste(1, (size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4))
    file = io.BytesIO()
    mask.save(file, "PNG")
    fields = {"caption": "a cat on a lawn", "caption_full": "a cat on a lawn", "label": "cat", "image_id": "-", "source": "-", "license": "-", "author": "-"}
    return [ShardSample(f"{i:04d}", jpeg(i % 8, size), "jpg", file.getvalue(), fields) for i in range(first, first + count)]


class Epoch:
    """Our loader over an epoch of `SAMPLES` x `times` samples, shuffled, cut and flipped at random, from shards of its own."""

    def __init__(self, shards: int = 1, workers: int = 0, side: int = SIDE, source: tuple[int, int] = SOURCE, times: int = 1):
        self.folder, self.count = tempfile.TemporaryDirectory(), SAMPLES * times
        each = self.count // shards
        for i in range(shards):
            write_shard(Path(self.folder.name) / f"train-{i}.tar", samples(each, source, i * each))
        pattern = f"{self.folder.name}/train-*.tar"
        config = TripletConfig(pattern, pattern, side, BATCH, workers, shuffle_buffer=self.count, steps_per_epoch=self.count // BATCH)
        module = TripletDataModule(config)
        module.setup("fit")
        self.loader = module.train_dataloader()  # one for all runs, as in training: a new one would first skip what the last has drawn

    def __call__(self) -> None:
        assert sum(len(batch) for batch in self.loader) == self.count


def bare_against_ours(device: torch.device) -> tuple[Run, Run]:
    """Both shuffle, decode by the same function with cuts and flips at random, and collate `SAMPLES` samples in this process."""
    ours = Epoch()

    def bare() -> None:
        dataset = wds.WebDataset([f"{ours.folder.name}/train-0.tar"], shardshuffle=False).shuffle(SAMPLES)
        decoded = (decode(sample, SIDE, np.random.default_rng(i), True) for i, sample in enumerate(itertools.islice(dataset, SAMPLES)))
        count = 0
        while batch := list(itertools.islice(decoded, BATCH)):
            count += len(collate(batch))
        assert count == SAMPLES

    return bare, ours


def whole_against_reduced(device: torch.device) -> tuple[Run, Run]:
    """From a JPEG of 1024 x 768 to 256 x 256 pixels: all by Pillow and whole, and as in training."""
    content = [jpeg(i) for i in range(8)]

    def whole() -> None:
        for picture in content:
            opened = Image.open(io.BytesIO(picture)).convert("RGB")
            opened.crop(square_box(opened.size, (0, 0, 1, 1))).resize((SIDE, SIDE), Image.Resampling.BICUBIC)

    def reduced() -> None:
        for picture in content:
            opened = open_picture(picture, at_least=SIDE)
            cut(opened, square_box(opened.size, (0, 0, 1, 1)), SIDE)

    return whole, reduced


def cases() -> list[Case]:
    return [
        Case("bare webdataset / our loader", ">= 1.0", f"{SAMPLES} JPEGs of 1024x768 to {SIDE}x{SIDE}, one process", bare_against_ours),
        Case("whole JPEG by Pillow / reduced decoding", ">= 2.0", f"1024x768 to {SIDE}x{SIDE}", whole_against_reduced),
        *growth(),
    ]


def growth() -> list[Case]:
    """Time of the larger over the smaller; with workers by the clock, since they are processes of their own (whose memory is not seen)."""
    shape = f"JPEGs of 1024x768 to {SIDE}x{SIDE}"

    def of_workers(name: str, larger: int, smaller: int) -> Case:
        many = f"{4 * SAMPLES} {shape} in 16 shards"
        return Case(f"growth: loader, {name}", "", many, lambda _: (Epoch(16, larger, times=4), Epoch(16, smaller, times=4)), by_the_clock=True)

    return [
        Case("growth: loader, 1 to 16 shards", "", f"{SAMPLES} {shape} in all, one process", lambda _: (Epoch(16), Epoch(1))),
        of_workers("none to 1 worker", 1, 0),
        of_workers("1 to 2 workers", 2, 1),
        Case("growth: loader, pictures of 256 to 512 pixels", "", f"{SAMPLES} JPEGs of 1024x768, one process", lambda _: (Epoch(side=512), Epoch())),
        Case("growth: loader, JPEGs of 512x384 to 1024x768", "", f"{SAMPLES} to {SIDE}x{SIDE}, one process", lambda _: (Epoch(), Epoch(source=(512, 384)))),
    ]
