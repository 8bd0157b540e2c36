"""Tiny shards, made on the fly: squares of one colour on grey, coloured by their number so that samples can be told apart."""

import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from miniature_bucket import encode
from PIL import Image

from datamodules.triplets import TripletConfig, TripletDataModule


def picture(number: int = 0, size=(16, 16)) -> Image.Image:
    image = Image.new("RGB", size, (128, 128, 128))
    image.paste((200, number % 256, 10), (4, 4, 10, 10))
    return image


def mask(size=(16, 16), box=(4, 4, 10, 10)) -> Image.Image:
    image = Image.new("L", size, 0)
    image.paste(255, box)
    return image


def sample(number: int, **files) -> dict[str, bytes | None]:
    """Files of one sample by extension; a keyword replaces one ("mask_png" for mask.png) or, when None, takes it away."""
    fields = {"caption": f"a toy robot in the city {number}", "label": "toy robot"}
    made = {"png": encode(picture(number)), "mask.png": encode(mask()), "json": json.dumps(fields).encode()}
    made |= {name.replace("_", "."): content for name, content in files.items()}
    return {name: content for name, content in made.items() if content is not None}


def write_tar(path, samples: dict[str, dict[str, bytes]]):
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for extension, content in sorted(files.items()):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def datamodule(folder, *, prepared: bool = True, **options) -> TripletDataModule:
    """Over `folder/train-*.tar` and `folder/val-*.tar` (train's where there is none), logging to `folder/bad.log`."""
    val = "val" if list(folder.glob("val-*.tar")) else "train"
    defaults = {"train": str(folder / "train-*.tar"), "val": str(folder / f"{val}-*.tar"), "image_size": 16, "batch_size": 2,
                "steps_per_epoch": 4, "flip": False, "shuffle_buffer": 5, "bad_samples": str(folder / "bad.log")}
    module = TripletDataModule(TripletConfig(**defaults | options))
    if prepared:
        module.setup("fit")
    return module


@pytest.fixture
def tools():
    """What the tests build shards with."""
    return SimpleNamespace(encode=encode, picture=picture, mask=mask, sample=sample, write_tar=write_tar, datamodule=datamodule,
                           keys=lambda loader: [list(batch.key) for batch in loader], rng=np.random.default_rng(0))


@pytest.fixture
def shards(tmp_path):
    """A folder with 4 training shards of 3 samples, keys s00 .. s11."""
    for number in range(4):
        rows = range(3 * number, 3 * number + 3)
        write_tar(tmp_path / f"train-{number:05d}.tar", {f"s{row:02d}": sample(row) for row in rows})
    return tmp_path
