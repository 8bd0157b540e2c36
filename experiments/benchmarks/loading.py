"""The loader against bare webdataset with the same decoding, and decoding at reduced scale against decoding whole."""

import io
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from datamodules import pictures
from datamodules.samples import decode
from datamodules.shards import ShardSample, write_shard
from datamodules.streams import collate
from datamodules.triplets import TripletConfig, TripletDataModule
from experiments.benchmarks.timing import Case

SAMPLES, BATCH, SIDE = 64, 16, 256
Run = Callable[[], object]


def photograph(seed: int) -> Image.Image:
    """1024 x 768 pixels of soft shapes under fine grain, which a JPEG of about 200 kB keeps."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize((1024, 768), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(soft) + rng.normal(0, 4, (768, 1024, 3))).clip(0, 255).astype(np.uint8))


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    photograph(seed).save(file, "JPEG", quality=90)
    return file.getvalue()


def samples() -> list[ShardSample]:
    mask = Image.new("L", (1024, 768), 0)
    mask.paste(255, (300, 200, 700, 600))
    file = io.BytesIO()
    mask.save(file, "PNG")
    fields = {"caption": "a cat on a lawn", "caption_full": "a cat on a lawn", "label": "cat", "image_id": "-", "source": "-", "license": "-", "author": "-"}
    return [ShardSample(f"{i:04d}", jpeg(i % 8), "jpg", file.getvalue(), fields) for i in range(SAMPLES)]


def bare_against_ours(device: torch.device) -> tuple[Run, Run]:
    """Both shuffle, decode by the same function with cuts and flips at random, and collate `SAMPLES` samples in this process."""
    folder = tempfile.TemporaryDirectory()
    shard = Path(folder.name) / "train-0.tar"
    write_shard(shard, samples())
    module = TripletDataModule(TripletConfig(str(shard), str(shard), SIDE, BATCH, steps_per_epoch=SAMPLES // BATCH))
    module.setup("fit")
    loader = module.train_dataloader()  # one for all runs, as in training: a new one would first skip what the last has drawn

    def ours() -> None:
        assert folder.name and sum(len(batch) for batch in loader) == SAMPLES

    def bare() -> None:
        dataset = wds.WebDataset([str(shard)], shardshuffle=False).shuffle(1000)
        decoded = (decode(sample, SIDE, np.random.default_rng(i), True) for i, sample in enumerate(itertools.islice(dataset, SAMPLES)))
        while batch := list(itertools.islice(decoded, BATCH)):
            collate(batch)

    return bare, ours


def whole_against_reduced(device: torch.device) -> tuple[Run, Run]:
    """From a JPEG of 1024 x 768 to 256 x 256 pixels, cut and resized as in training."""
    content = [jpeg(i) for i in range(8)]

    def run(at_least: int | None) -> None:
        for picture in content:
            opened = pictures.open_picture(picture, at_least=at_least)
            pictures.cut(opened, pictures.square_box(opened.size, (0, 0, 1, 1)), SIDE)

    return lambda: run(None), lambda: run(SIDE)


def cases() -> list[Case]:
    return [
        Case("bare webdataset / our loader", ">= 1.0", f"{SAMPLES} JPEGs of 1024x768 to {SIDE}x{SIDE}, one process", bare_against_ours),
        Case("whole JPEG decoding / reduced decoding", ">= 2.0", f"1024x768 to {SIDE}x{SIDE}", whole_against_reduced),
    ]
