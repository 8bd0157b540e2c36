"""Damaged pictures, masks and captions: each becomes a good one or a named reason, never a hang and never another exception.

200 inputs; MOMA_FUZZ=5000 for more.
"""

import os
import re

import numpy as np
import pytest
from miniature_bucket import encode
from PIL import Image

from datamodules.openimages.captions import CaptionError, CaptionRules, finish
from datamodules.openimages.config import CaptionConfig, SelectConfig, ShardConfig, SourcesConfig
from datamodules.openimages.sources import Sources
from datamodules.openimages.subjects import RejectedError, fit_mask, read_picture, read_subject
from datamodules.samples import contains_label

COUNT = int(os.environ.get("MOMA_FUZZ", "200"))
SELECT, SHARDS, RULES = SelectConfig(min_side=32, max_pixels=1_000_000), ShardConfig(), CaptionRules.of(CaptionConfig())
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


class OneMask(Sources):
    """Sources whose every mask is `content`."""

    content = b""

    def mask(self, name: str) -> bytes:
        return self.content


def test_pictures_and_masks_become_good_ones_or_a_reason(pictures_, tmp_path):
    mask = Image.new("L", (40, 32))
    mask.paste(255, (10, 8, 30, 24))
    sources, whole = OneMask(SourcesConfig(), "train", tmp_path), encode(mask)
    reasons: list[str] = []
    for number in range(COUNT):
        rng = np.random.default_rng([3, number])
        content = damaged(pictures_[number % len(pictures_)], rng)
        sources.content = damaged(whole, rng) if number % 3 == 0 else whole
        try:
            subject = read_subject({"MaskPath": "0.png"}, sources, SELECT)
            picture = read_picture(content, float(rng.choice([0, 90, 270, 45])), SELECT, SHARDS)
            fit_mask(subject.mask, picture)
            reasons.append("good")
        except RejectedError as error:
            reasons.append(error.reason)
    assert len(reasons) == COUNT and 0 < reasons.count("good") < COUNT // 2
    assert all(reason == "good" or REASON.fullmatch(reason) for reason in reasons), set(reasons)


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
