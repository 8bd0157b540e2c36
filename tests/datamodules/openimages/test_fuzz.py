"""Damaged pictures, masks, zips and captions: each becomes a good one or a named reason, never a hang and never another exception.

MOMA_FUZZ: how many files (pictures, and as many masks) and how many captions; a tenth as many zips.
"""

import io
import os
import re
import signal
import zipfile
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
from miniature_bucket import CLASSES, Miniature, encode
from PIL import Image

from datamodules.openimages import units
from datamodules.openimages.build import build
from datamodules.openimages.captions import CaptionError, CaptionRules, finish
from datamodules.openimages.config import CaptionConfig, RunConfig, SelectConfig, SourcesConfig
from datamodules.openimages.sources import Sources
from datamodules.openimages.subjects import RejectedError, fetch_mask
from datamodules.samples import BadSamples, decode, read_shards
from datamodules.shards import contains_label

COUNT = int(os.environ.get("MOMA_FUZZ", "5000"))
SELECT, RULES = SelectConfig(min_side=32, max_pixels=1_000_000, near_duplicate_bits=None), CaptionRules.of(CaptionConfig())
REASON = re.compile(r"(picture|mask|area|at|caption|rotation)_[a-z0-9_]+")


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut, with bytes changed, a part repeated, a part left out, or another file's head."""
    kind, data = rng.integers(6), bytearray(content)
    a, b = sorted(rng.integers(0, len(data), 2).tolist())
    if kind == 0:
        return bytes(data[:a])
    if kind == 1:
        for i in rng.integers(0, len(data), rng.integers(1, 30)):
            data[i] = rng.integers(256)
        return bytes(data)
    if kind == 2:
        return bytes(data[:b] + data[a:])
    if kind == 3:
        return bytes(data[:a] + data[b:])
    if kind == 4:
        return rng.bytes(16) + bytes(data[16:])
    return rng.bytes(int(rng.integers(0, 200)))


@pytest.fixture(scope="module")
def pictures_():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 10, 3), np.uint8)).resize((80, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    return [encode(picture, "JPEG"), encode(picture, "JPEG", progressive=True), encode(picture.convert("CMYK"), "JPEG"), encode(picture, "PNG"),
            encode(picture, "WEBP"), encode(picture, "GIF"), encode(picture, "TIFF"), encode(picture, "JPEG", exif=exif),
            encode(picture.convert("I;16"))]


@contextmanager
def deadline(seconds: float = 10):
    """What takes longer fails, by an exception that nothing takes for a damaged file."""
    def late(*_):
        pytest.fail(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def in_time(monkeypatch):
    """Each step of the build that reads a picture or a mask has its deadline."""
    def watched(step):
        def run(*arguments):
            with deadline():
                return step(*arguments)
        return run

    for name in ("read_subject", "read_picture", "fit_mask"):
        monkeypatch.setattr(units, name, watched(getattr(units, name)))


def is_damaged(number: int) -> bool:
    return number % 10 > 0


def test_pictures_and_masks_become_triplets_or_are_counted(pictures_, config_of, counted, in_time, tmp_path):
    """A whole build of damaged files: nothing is lost, nothing hangs, what is undamaged comes through, and what comes through can be read."""
    mask = Image.new("L", (80, 64))
    mask.paste(255, (20, 16, 60, 48))
    made, count = Miniature(), COUNT // 2
    for number in range(count):
        rng = np.random.default_rng([3, number])
        content = pictures_[number % len(pictures_) if is_damaged(number) else 0]
        made.add_picture(number, damaged(content, rng) if is_damaged(number) else content, CLASSES["cat"], "a cat", mask)
        if is_damaged(number):
            made.rows["metadata"][-1]["Rotation"] = float(rng.choice([0, 90, 270, 45]))
            last = next(reversed(made.masks))
            made.masks[last] = damaged(made.masks[last], rng) if number % 3 == 0 else made.masks[last]
    config = config_of(made.write(tmp_path / "bucket"), select=SELECT, run=RunConfig(workers=0))
    found = counted(build(config))
    triplets = found["triplets"]
    assert found.pop("masks") == count == sum(found.values()) and count // 10 < triplets < count // 2
    assert all(REASON.fullmatch(reason) for reason in found if reason != "triplets"), found
    bad = BadSamples(tmp_path / "bad.log", "raise")
    keys = [decode(sample, 16).key for sample in read_shards(sorted(map(str, tmp_path.glob("shards/*.tar"))), bad)]
    assert len(set(keys)) == triplets and {image for i, image in enumerate(made.ids) if not is_damaged(i)} <= {key[:16] for key in keys}


def test_damaged_zips_give_their_masks_or_a_reason_or_are_named(tmp_path):
    names = [f"0{i:015x}_m01yrx_{i:08x}.png" for i in range(8)]
    contents = {name: encode(Image.new("1", (8 + i, 8))) for i, name in enumerate(names)}
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    outcomes: Counter[str] = Counter()
    config = SourcesConfig(str(tmp_path), str(tmp_path), mask_zip="{digit}.zip")
    for number in range(max(50, COUNT // 10)):
        rng = np.random.default_rng([7, number])
        (tmp_path / "0.zip").write_bytes(damaged(whole.getvalue(), rng))
        sources = Sources(config, "train", tmp_path / f"cache{number}")
        with deadline():
            try:
                sources.prepare()
            except ValueError as error:
                outcomes["named" if re.search(r"0\.zip is not a whole zip \(.+run again", str(error)) else repr(error)] += 1
                continue
            for name in names:
                try:
                    assert fetch_mask(name, sources) == contents[name]
                    outcomes["read"] += 1
                except RejectedError as error:
                    outcomes[error.reason] += 1
    assert set(outcomes) == {"named", "read", "mask_broken", "mask_missing"}, outcomes
    assert outcomes["mask_missing"] < outcomes["mask_broken"], outcomes


def test_captions_keep_their_label_or_have_a_reason():
    words = ["a", "an", "the", "red", "light", "and", "black", ",", ".", "cat", "cats", "orange", "in", "of", "man", "\u2019", "-", "white-", "\x00", "é", "🐈"]
    for number in range(COUNT):
        rng = np.random.default_rng([5, number])
        text = " ".join(rng.choice(words, rng.integers(0, 12)))
        raw = rng.bytes(20) if number % 10 == 0 else text
        try:
            found = finish(raw, "cat", RULES)[1]
        except CaptionError as error:
            found = f"cat: {error}" if REASON.fullmatch(str(error)) else str(error)
        assert contains_label(found, "cat"), (raw, found)
